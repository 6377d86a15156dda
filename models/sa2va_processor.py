"""Sa2VA's preprocessing, one object for training and prediction: pictures and texts -> tensors, and its two files.

A picture goes two ways. The language model sees it as tiles of S x S (InternVL) or as patches (Qwen-VL); SAM 2 sees it
resized to R x R, whatever its aspect ratio. A video is a list of pictures: one tile each, one image block each.
The text is `<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n` and the answer with `<|im_end|>`; only
answers and their end tokens carry labels. There is no system message.

Shapes: B samples, L tokens, D width, F pictures that SAM 2 sees of a sample (1, or the frames of a video), n objects =
[SEG] tokens of a sample's answers. Pictures are RGB uint8 (H, W, 3).
Source: Yuan et al., Sa2VA, arXiv 2501.04001, and the template of the released models.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from utils.run import UserError

ARCHS = ("internvl", "qwen2_5_vl", "qwen3_vl")
IMAGE = "<image>"  # where a question wants the picture; without it the picture comes first, on its own line
SEG, END, NEW_TOKENS = "[SEG]", "<|im_end|>", ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
BLOCKS = {  # begin, one position, end of a picture in the text
    "internvl": ("<img>", "<IMG_CONTEXT>", "</img>"),
    "qwen2_5_vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "qwen3_vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = -100  # label of a position without a loss

QUESTIONS = (  # {} is the object's name
    "Please segment the {} in this image.",
    "Can you segment the {} in this image?",
    "What is the {} in this image? Please answer with a segmentation mask.",
    "Where is the {}? Please give its segmentation mask.",
    "Please show the {} as a segmentation mask.",
    "Could you outline the {} in this picture?",
)
ANSWERS = (
    "It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].", "Sure, the segmentation result is [SEG].", "[SEG].",
)  # fmt: skip
ABSENT_ANSWERS = ("There is no {} in this image.", "I see no {} here.")  # negatives: nothing to segment
FORCED = ANSWERS[0]  # what `force_seg` answers in the model's place


@dataclass
class ProcessorConfig:
    """Everything preprocess.json holds; the values of the released InternVL line."""

    arch: str = "internvl"  # one of ARCHS
    tile: int = 448  # S, px: side of a tile (internvl)
    tile_tokens: int = 256  # text positions of a tile (internvl)
    min_tiles: int = 1
    max_tiles: int = 12  # without the thumbnail
    patch: int = 14  # px: side of a patch (qwen)
    merge: int = 2  # patches per side that become one text position (qwen)
    min_pixels: int = 512 * 28 * 28  # of the resized picture (qwen)
    max_pixels: int = 2048 * 28 * 28
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))  # of the language model's pictures
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    sam_size: int = 1024  # R, px
    frames: int = 5  # pictures of a video that the language model sees and the masks start from
    max_length: int = 8192  # tokens of a sample

    def __post_init__(self):
        if self.arch not in ARCHS or not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"ProcessorConfig: arch {self.arch!r}, {self.min_tiles}..{self.max_tiles} tiles; expected "
                             f"one of {ARCHS} and 1 <= min_tiles <= max_tiles")  # fmt: skip


def tile_grid(width: int, height: int, cfg: ProcessorConfig) -> tuple[int, int]:
    """(columns, rows) of tiles for a picture: the grid of min_tiles..max_tiles tiles whose aspect ratio is nearest.
    Of equally near grids the larger one, if the picture has more than half of that grid's pixels. (InternVL)"""
    lowest, highest = cfg.min_tiles, cfg.max_tiles
    sides = range(1, highest + 1)
    grids = [(i * j, i, j) for i in sides for j in sides if lowest <= i * j <= highest]
    best, best_off = (1, 1), float("inf")
    for area, i, j in sorted(grids):
        off = abs(width / height - i / j)
        if off < best_off or (off == best_off and width * height > 0.5 * cfg.tile**2 * area):
            best, best_off = (i, j), off
    return best


class Sa2VAProcessor:
    """cfg and a transformers tokenizer that knows the special tokens. UserError when it does not."""

    def __init__(self, cfg: ProcessorConfig, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.begin, self.position, self.end = BLOCKS[cfg.arch]
        needed = (SEG, END, "<|im_start|>", *BLOCKS[cfg.arch])
        known = tokenizer.get_vocab()
        absent = [t for t in needed if t not in known or len(self.ids(t)) != 1]
        if absent or tokenizer.pad_token_id is None:
            raise UserError(f"tokenizer: {absent or 'a padding token'} missing as special tokens; expected the "
                            "tokenizer of a Sa2VA checkpoint, or one with these tokens added")  # fmt: skip
        self.seg_id, self.end_id, self.image_id = (known[t] for t in (SEG, END, self.position))
        self.pad_id = tokenizer.pad_token_id

    def ids(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a text; first: the tokenizer may put its begin token in front (InternLM2 has one)."""
        return self.tokenizer(text, add_special_tokens=first)["input_ids"]

    # ---- pictures

    def tiles(self, image: np.ndarray) -> torch.Tensor:
        """image uint8 (H, W, 3) -> (n, 3, S, S) float32, normalised: the grid row by row, then the whole picture as a
        thumbnail when there is more than one tile. Bicubic."""
        picture, S = Image.fromarray(checked(image)), self.cfg.tile
        columns, rows = tile_grid(*picture.size, self.cfg)
        large = picture.resize((columns * S, rows * S), Image.BICUBIC)
        corners = [(x * S, y * S) for y in range(rows) for x in range(columns)]
        pieces = [large.crop((x, y, x + S, y + S)) for x, y in corners]
        if len(pieces) > 1:
            pieces.append(picture.resize((S, S), Image.BICUBIC))
        return torch.stack([normalise(p, self.cfg.mean, self.cfg.std) for p in pieces])

    def sam_image(self, image: np.ndarray) -> torch.Tensor:
        """image uint8 (H, W, 3) -> (3, R, R) float32, normalised; resized without keeping the aspect ratio. Bicubic."""
        R = self.cfg.sam_size
        return normalise(Image.fromarray(checked(image)).resize((R, R), Image.BICUBIC), IMAGENET_MEAN, IMAGENET_STD)

    def pictures(self, images: Sequence[np.ndarray], video: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
        """What the language model gets of the pictures, and how many text positions each takes.

        internvl: pixel_values (tiles, 3, S, S). qwen: pixel_values (patches, values), image_grid_thw int64 (F, 3).
        """
        cfg = self.cfg
        if cfg.arch == "internvl" and video:  # one tile per frame
            size = (cfg.tile, cfg.tile)
            frames = [Image.fromarray(checked(x)).resize(size, Image.BICUBIC) for x in images]
            pixels = torch.stack([normalise(x, cfg.mean, cfg.std) for x in frames])
            return {"pixel_values": pixels}, [cfg.tile_tokens] * len(images)
        if cfg.arch == "internvl":
            pixels = [self.tiles(x) for x in images]
            return {"pixel_values": torch.cat(pixels)}, [len(x) * cfg.tile_tokens for x in pixels]
        patches = Qwen2VLImageProcessor(
            min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels, patch_size=cfg.patch, merge_size=cfg.merge,
            image_mean=cfg.mean, image_std=cfg.std,
        )  # fmt: skip
        found = patches([checked(x) for x in images], return_tensors="pt")
        grid = found["image_grid_thw"]
        values = {"pixel_values": found["pixel_values"], "image_grid_thw": grid}
        return values, (grid.prod(1) // cfg.merge**2).tolist()

    # ---- texts

    def turn(self, question: str, block: str) -> str:
        """A user's turn up to where the assistant begins; `block` takes the place of <image>, or comes first."""
        kept = [t for t in (*BLOCKS[self.cfg.arch], "<|im_start|>", END, SEG) if t in question]
        if kept:
            raise UserError(f"text {question!r}: holds the special token {kept[0]}; write the question without it")
        if not block and IMAGE in question:
            raise UserError(f"text {question!r}: asks for {IMAGE}, and no picture was given; give one or leave it out")
        if question.count(IMAGE) > 1:
            raise UserError(f"text {question!r}: {IMAGE} stands there more than once; write it once")
        if block:
            question = question.replace(IMAGE, block) if IMAGE in question else f"{block}\n{question}"
        return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"

    def conversation(self, turns: list[tuple[str, str | None]], positions: list[int]) -> tuple[list[int], list[int]]:
        """(question, answer) pairs -> token ids and labels; a last answer of None leaves the assistant to begin."""
        blocks = [self.begin + self.position * k + self.end for k in positions]
        ids, labels = [], []
        for k, (question, answer) in enumerate(turns):
            if answer is None and k < len(turns) - 1:
                raise ValueError("conversation: only the last answer may be open")
            asked = self.ids(self.turn(question, "\n".join(blocks) if k == 0 else ""), first=k == 0)
            ids, labels = ids + asked, labels + [IGNORE] * len(asked)
            if answer is not None:
                said, separator = self.ids(answer + END), self.ids("\n")
                ids, labels = ids + said + separator, labels + said + [IGNORE] * len(separator)
        if len(ids) > self.cfg.max_length:
            raise UserError(f"text {turns[0][0]!r}: {len(ids)} tokens with its pictures, at most {self.cfg.max_length} "
                            "fit; shorten it, or take fewer tiles or frames")  # fmt: skip
        return ids, labels

    # ---- samples and batches

    def encode(self, images, text: str | Sequence[str], answer: str | Sequence[str] | None = None, masks=None,
               sam_images: Sequence[np.ndarray] | None = None) -> dict:  # fmt: skip
        """One sample: an item for `collate`.

        images: one picture, a list of frames of a video, or None. text, answer: strings, or lists of as many turns;
        answer None: to be generated. masks: bool (n, H, W), or (n, F, H, W) of a video, in the order of the answers'
        n [SEG]; None: no mask loss for this sample. sam_images: what SAM 2 sees, if not `images` (crops; [] for none).
        -> input_ids, labels int64 (L,); pixel_values (and image_grid_thw) or absent; sam_pixels (F, 3, R, R); masks;
        size (H, W) of SAM 2's pictures; frames F. UserError for a text that cannot be asked.
        """
        video = isinstance(images, list | tuple)
        pictures = [] if images is None else list(images) if video else [images]
        item, positions = self.pictures(pictures, video) if pictures else ({}, [])
        questions = [text] if isinstance(text, str) else list(text)
        answers = [answer] if answer is None or isinstance(answer, str) else list(answer)
        if len(answers) != len(questions):
            raise ValueError(f"encode: {len(questions)} questions, {len(answers)} answers; expected as many")
        ids, labels = self.conversation(list(zip(questions, answers, strict=True)), positions)
        seen = pictures if sam_images is None else list(sam_images)
        sizes = {checked(x).shape[:2] for x in seen}
        if len(sizes) > 1:
            raise ValueError(f"encode: pictures of one sample have sizes {sorted(sizes)}; expected one size")
        item |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "frames": len(seen),
                 "size": next(iter(sizes), None), "masks": None}  # fmt: skip
        if seen:
            item["sam_pixels"] = torch.stack([self.sam_image(x) for x in seen])
        if masks is not None:
            item["masks"] = self.checked_masks(torch.as_tensor(np.asarray(masks)), labels.count(self.seg_id), item)
        return item

    def checked_masks(self, masks: torch.Tensor, objects: int, item: dict) -> torch.Tensor:
        frames, size = item["frames"], item["size"]
        F = () if masks.ndim == 3 and frames == 1 else (frames,)
        if masks.dtype != torch.bool or size is None or masks.shape != (objects, *F, *size):
            raise ValueError(f"encode: masks {masks.dtype} {tuple(masks.shape)} for {objects} [SEG] in the answers and "
                             f"{frames} pictures of {size}; expected bool (n, H, W), or (n, F, H, W)")  # fmt: skip
        return masks

    def collate(self, items: Sequence[dict], left: bool = False) -> dict:
        """Items -> batch; padded on the right, or on the left to generate.

        input_ids, attention_mask, labels int64 (B, L); pixel_values (sum of tiles or patches, ...) and image_grid_thw,
        sam_pixels (sum of F, 3, R, R): each None without pictures; frames, masks, sizes: lists of B.
        """
        L = max(len(item["input_ids"]) for item in items)
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        for item in items:
            n = len(item["input_ids"])
            pad = (L - n, 0) if left else (0, L - n)
            ones = torch.ones(n, dtype=torch.int64)
            for name, row, fill in (("input_ids", item["input_ids"], self.pad_id), ("attention_mask", ones, 0),
                                    ("labels", item["labels"], IGNORE)):  # fmt: skip
                rows[name].append(torch.nn.functional.pad(row, pad, value=fill))
        batch = {name: torch.stack(values) for name, values in rows.items()}
        for name in ("pixel_values", "image_grid_thw", "sam_pixels"):
            found = [item[name] for item in items if name in item]
            batch[name] = torch.cat(found) if found else None
        lists = {"frames": "frames", "masks": "masks", "size": "sizes"}
        return batch | {plural: [item[name] for item in items] for name, plural in lists.items()}

    # ---- files

    def save(self, folder: Path | str) -> None:
        """preprocess.json and tokenizer/ into an existing folder."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "preprocess.json").write_text(json.dumps(asdict(self.cfg), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "Sa2VAProcessor":
        """What `save` wrote. UserError names what is missing or does not fit this version."""
        folder = Path(folder)
        for name in ("preprocess.json", "tokenizer/tokenizer.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; expected a complete Sa2VA checkpoint folder")
        try:
            cfg = ProcessorConfig(**json.loads((folder / "preprocess.json").read_text(encoding="utf-8")))
        except (TypeError, ValueError) as e:
            raise UserError(f"{folder}/preprocess.json: not of this version ({e}); convert or train again") from e
        return cls(cfg, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


def checked(image: np.ndarray) -> np.ndarray:
    """The picture, or ValueError unless it is RGB uint8 (H, W, 3)."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        about = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise ValueError(f"Sa2VA: picture {about}, expected uint8 (H, W, 3)")
    return image


def normalise(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """RGB picture -> (3, H, W) float32: (x / 255 - mean) / std."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
