"""Names of classes: the 80 of COCO in the order of their ids 1..90 (which have gaps), and lists in text files."""

from collections import Counter
from pathlib import Path

from utils.run import UserError

COCO_80 = tuple(
    name.strip()
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush
    """.replace("\n", " ").split(",")
)


def read_names(path: Path | str) -> list[str]:
    """Names or texts, one a line. UserError when there is none or one stands there twice."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}); expected a text file with a name in each line") from e
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or not names:
        raise UserError(f"{path}: {twice[0] + ' stands in it twice' if twice else 'is empty'}; mend the list")
    return names
