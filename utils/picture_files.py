"""Pictures that a user names on the command line, as files and folders, and the ids that results give them."""

import re
from pathlib import Path

from utils.run import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # looked for in a folder


def find_images(names: list[str]) -> dict[int | str, Path]:
    """{image_id: file} of the files and of the pictures of the folders, by name.

    Ids are the numbers where every file is named as in COCO (12 digits at the end), else the names without suffix.
    UserError for a name that is neither file nor folder, a folder without pictures, or two files of one id.
    """
    found = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no pictures ({', '.join(SUFFIXES)}); give a folder of pictures")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give pictures or folders of pictures")
    numbers = [re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", p.stem) for p in found]
    images: dict[int | str, Path] = {}
    for path, m in zip(found, numbers, strict=True):
        i = int(m[1]) if all(numbers) else path.stem
        if i in images:
            raise UserError(f"{images[i]} and {path}: both are image '{i}' in the results; rename or leave out one")
        images[i] = path
    return images
