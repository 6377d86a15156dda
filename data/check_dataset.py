"""Look at a data set before training on it: counts, the first problem as one sentence, and a picture of a batch.

python data/check_dataset.py peaks labels.json --videos videos/                         # decodes every video once
python data/check_dataset.py peaks labels/ --videos videos/ --size 224x224 --task spot --show sheet.png
python data/check_dataset.py rally --level hard --show sheet.png                        # rendered clips, seconds
python data/check_dataset.py captions datasets/coco --ids m2_annotations/ --show sheet.png --batch-size 16
python data/check_dataset.py panoptic datasets/coco --split val --show sheet.png        # also instances
python data/check_dataset.py refcoco datasets/refcoco/refs_unc.json --images datasets/coco/train2014
python data/check_dataset.py vessels datasets/CHASE_DB1 --image-size 160 --batch-size 8 --show sheet.png
python data/check_dataset.py manifest my_pictures/manifest.jsonl --show sheet.png
python data/check_dataset.py moving_shapes --image-size 96 --clip-len 12 --show sheet.png
python data/check_dataset.py davis datasets/DAVIS --split val --clip-len 4 --stride 1,5 --show sheet.png
python data/check_dataset.py ytvis datasets/ytvis_2019/train.json --clip-len 4 --show sheet.png
python data/check_dataset.py rgbd 7scenes/heads/seq-01 --show sheet.png                   # posed RGB-D; also rooms, scannet
python data/check_dataset.py ball labels/ --videos videos/ --show sheet.png             # ball positions, TrackNet csv

FORMAT peaks: E2E-Spot json, one file or a folder of them. FORMAT rally: rendered when asked for, so it has no ROOT.
FORMAT captions: a COCO folder (2014 or 2017), or a folder with a csv of columns image,caption, as of Flickr8k.
FORMAT panoptic, instances: COCO's json file, or the folder with annotations/; pictures are looked for beside them.
FORMAT cityscapes: the folder of leftImg8bit/ and gtFine/. FORMAT sa1b: a folder of sa_*.json. FORMAT refcoco: the refs
as json (data/refcoco.py says how to make them), instances.json beside. FORMAT moving_shapes: rendered, no ROOT.
FORMAT davis: DAVIS, or folders of frames and masks (data/davis.py). FORMAT ytvis: YouTube-VIS json. FORMAT vipseg: the
folder of images/ and panomasks/. FORMAT pseudo_video: COCO's panoptic or instances json, each picture as a clip.
FORMAT vessels: the folder of CHASE_DB1, DRIVE, STARE, HRF, FIVES or ARCADE (data/vessels.py shows their layouts).
FORMAT ball: a csv of ball positions or a folder of them (data/ball_labels.py), NAME.mp4 beside NAME.csv or
NAME_ball.csv, or in --videos.
FORMAT rgbd: a folder of colour, depth, pose, as 7-Scenes, TUM, SceneNN, 3RScan, a ScanNet export (data/rgbd_folder.py).
FORMAT rooms: rendered, no ROOT. FORMAT scannet: an index json of data/prepare_scannet.py.
FORMAT manifest: anybody's pictures with named masks, one per line of manifest.jsonl (data/referring_manifest.py).
The picture holds the first batch of training with the same flags: a row per clip, the frames around its peak; captions:
images as the network sees them, with the labels of their patches, and the captions after encoding; segmentation: a row
per picture, a column per task, targets tinted, ignored pixels grey, clicks and boxes drawn; videos: clips, then the
videos with the frames on which objects are first marked; vessels, manifest: patches
of --image-size px, as they are and with their objects tinted, what lies outside the field of view grey.
Flags that both scripts have mean the same and have the same defaults.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.ball_checks import BALL_FORMATS, check_ball
from data.caption_checks import check_captions
from data.caption_files import SPLITS
from data.coco_captions import ImageReader
from data.peak_checks import draw_batch, first_batch, peaks_data, rally_data
from data.rgbd_checks import RGBD_FORMATS, check_rgbd
from data.segment_checks import FORMATS, check_segmentation
from data.vessel_checks import VESSEL_FORMATS, check_vessels
from data.vessels import FORMATS as LAYOUTS
from data.video_checks import VIDEO_FORMATS, check_videos
from utils import overlay, run
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    formats = ["peaks", "rally", "captions", *BALL_FORMATS, *VESSEL_FORMATS, *FORMATS, *VIDEO_FORMATS, *RGBD_FORMATS]
    p.add_argument("format", metavar="FORMAT", choices=formats, help=", ".join(formats[:-1]) + f" or {formats[-1]}")
    p.add_argument("root", metavar="ROOT", nargs="?",
                   help="peaks: label file (E2E-Spot json) or folder of label files; captions: folder; "
                        "see above")  # fmt: skip
    p.add_argument("--videos", default=None, help="folder of the videos that the label files name")
    p.add_argument("--show", default=None, metavar="PNG", help="write a picture of the first training batch here")
    p.add_argument("--columns", type=int, default=9, help="frames per clip in the picture")
    p.add_argument("--limit", type=int, default=32,
                   help="rally: clips rendered and counted; captions, segmentation, vessels: images decoded per "
                        "split (0: all)")  # fmt: skip
    p.add_argument(
        "--no-duplicates", action="store_true", help="do not decode whole videos to look for repeated frames"
    )
    p.add_argument("--images", default=None, help="segmentation: folder of the pictures (default: looked for)")
    g = p.add_argument_group("davis, ytvis, vipseg")
    g.add_argument("--stride", default="1,3", metavar="LOW,HIGH", help="frames from one of a clip to the next")
    g.add_argument("--year", type=int, default=2017, choices=[2016, 2017], help="davis: 2016 joins all objects to one")
    g = p.add_argument_group("rgbd")
    g.add_argument("--intrinsics", default=None, metavar="FX,FY,CX,CY", help="px of the depth (default: the folder's)")
    g.add_argument("--depth-scale", type=float, default=None, help="depth units to a metre (default: of the layout)")
    g = p.add_argument_group("vessels, manifest")
    g.add_argument("--layout", default="auto", choices=["auto", *LAYOUTS], help="whose layout ROOT has")
    g.add_argument("--split-at", type=int, default=None, metavar="N",
                   help="last child (chase), picture (stare) or number within its group (hrf) that is for training")  # fmt: skip
    g.add_argument("--polygons", action="store_true", help="manifest: accept polygons, and measure what they hide")
    g = p.add_argument_group("captions; the first four as in train/train_fsgr.py")
    g.add_argument("--ids", default=None, help="folder of coco_{train,restval,dev,test}_ids.npy: annotation ids")
    g.add_argument("--karpathy", default=None, metavar="JSON", help="dataset_coco.json of the Karpathy splits")
    g.add_argument("--vocab", default=None, metavar="JSON", help="vocabulary file (default: words of the train split)")
    g.add_argument("--min-freq", type=int, default=5, help="a word of a new vocabulary occurs at least so often")
    g.add_argument(
        "--split",
        default=None,
        choices=[*SPLITS, "testA", "testB"],
        help="check this split only (default: all that exist)",
    )
    g.add_argument("--image-size", type=int, default=224, help="side of the square that the network sees, pixels")
    g.add_argument("--resize", default="squash", choices=["squash", "crop"], help="squash it, or cut its centre out")
    g = p.add_argument_group("as in train/train.py")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    g.add_argument("--classes", default=None, help="comma-separated labels to learn (default: all in --data)")
    g.add_argument("--frames", default=None, metavar="A:B", help="train on frames A..B-1 of every video")
    g.add_argument("--clips", type=int, default=1000, help="clips per epoch")
    g.add_argument("--event-share", type=float, default=0.8, help="share of the training clips that hold an event")
    g.add_argument("--clip-len", type=int, default=64, help="frames per clip, T")
    g.add_argument("--size", default="64x64", metavar="WxH", help="pixels that the network sees")
    g.add_argument("--crop", default=None, metavar="X,Y,W,H", help="pixels of the video to cut out before resizing")
    g.add_argument("--no-augment", action="store_true", help="clips as they are: no mirror, shift, light")
    g.add_argument("--no-flip", action="store_true", help="never mirror (for classes that know left and right)")
    g.add_argument(
        "--splice", type=float, default=0.0, help="share of the clips that are cut to a scene without events"
    )
    g.add_argument("--level", default="easy", choices=["easy", "hard"], help="difficulty of rendered rallies")
    g.add_argument("--shuffle-frames", action="store_true", help="control: rally clips with their frames permuted")
    g.add_argument("--task", default="peak", choices=["peak", "spot"],
                   help="peak: one frame per clip; spot: K classes per frame")  # fmt: skip
    g.add_argument("--no-peak", action="store_true", help="peak: one more logit for 'no peak in this clip'")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag in ("columns", "limit", "batch_size", "clips", "clip_len"):
        least = (
            0
            if flag == "limit" and args.format in ("captions", *VESSEL_FORMATS, *FORMATS, *VIDEO_FORMATS, *RGBD_FORMATS)
            else 1
        )
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least {least}")
    run.check_ranges(args, min_freq=(1, 10**9), image_size=(16, 8192))
    size, crop = run.numbers("--size", args.size, "x", 2), run.numbers("--crop", args.crop, ",", 4)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected at least 0")
    if min(size) < 1:
        raise UserError(f"--size {args.size}: both sides must be at least 1 pixel")
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=args.seed), argv)

    # ---- data
    if args.format == "captions":
        reader, show = ImageReader(args.image_size, args.resize), args.batch_size if args.show else 0
        picture = check_captions(args.root, args.split, args.ids, args.karpathy, args.vocab, args.min_freq,
                                 args.limit, reader, show, args.seed)  # fmt: skip
    elif args.format in VESSEL_FORMATS:
        picture = check_vessels(args)
    elif args.format in FORMATS:
        picture = check_segmentation(args)
    elif args.format in VIDEO_FORMATS:
        picture = check_videos(args)
    elif args.format in RGBD_FORMATS:
        picture = check_rgbd(args)
    elif args.format in BALL_FORMATS:
        picture = check_ball(args)
    elif args.format == "rally":
        data, classes = rally_data(args, size)
    else:
        data, classes = peaks_data(args, size, crop)

    # ---- result
    if args.show:
        names = [path.name for path in data.paths] if args.format == "peaks" else None
        if args.format in ("peaks", "rally"):
            picture = draw_batch(first_batch(data, args), classes, names, args.columns, args.task)
        Path(args.show).parent.mkdir(parents=True, exist_ok=True)
        overlay.save_png(args.show, picture)
        run.say(r, f"picture of the first training batch: {args.show}")
    print("no problem found")


if __name__ == "__main__":
    sys.exit(run.cli(main))
