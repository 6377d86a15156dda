"""Instances of a room from a folder of posed RGB-D frames, frame by frame.  Reads frames and a checkpoint, no labels.

    python eval/infer_scene.py recordings/kitchen --ckpt runs/esam/best --out runs/rooms
    python eval/infer_scene.py recordings/kitchen --ckpt runs/esam/best --out runs/rooms --every 10 --limit 200 \\
        --depth-scale 5000 --intrinsics 525,525,319.5,239.5 --turntable
    python eval/infer_scene.py scannet/2D/scene0011_00 scannet/2D/scene0015_00 --ckpt runs/esam/best --out runs/scenes \\
        --mesh scannet/3D/{scene}/{scene}_vh_clean_2.ply \\
        --segments scannet/3D/{scene}/{scene}_vh_clean_2.0.010000.segs.json

FOLDER: layouts of 7-Scenes, TUM, 3RScan, SceneNN, or color/ depth/ pose/ intrinsic.txt (data/rgbd_folder.py); its name
is the scene's. Writes to OUT, which eval/eval_scannet.py reads as --pred:
    <scene>.txt  pred_mask/  semantic/<scene>.txt    ScanNet's files, best score first
    npz/<scene>.npz     points, colour, instance, semantic, masks; ids, labels, scores, boxes of the objects; turn
    ply/<scene>.ply     the cloud in the objects' colours, with the properties instance and semantic
    pictures/<scene>.png   the scene and its objects from above and aslant; .mp4 with --turntable
    timing/<scene>.csv     seconds, objects and remembered MB after every frame
    summary.json  summary.json.meta.json   objects of every scene, and what they were made from
Points are voxels of 2 cm, or with --mesh the vertices of a reconstruction in the same world; --segments (ScanNet's
segs.json) makes each segment wholly in an object or not. A checkpoint of single views (stage sv) has no merge vectors:
its frames are merged by geometry. --merge voted: a query is one instance, whatever its class, and the instances of an
object vote for its class; published is that only those of one class meet. What is remembered of a scene is constant per place.

Networks learn with z up. --up auto turns worlds in which cameras do not stand upright (7-Scenes); boxes are then those
of the turned world, `turn` (3, 3) takes points there. ids of classes are ScanNet's where the names are; rendered rooms
have those of data/room_files.py. A network without classes gives all objects the id 1: score with --agnostic.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.esam_views import points_view
from data.rgbd_checks import decimals
from data.rgbd_folder import LAYOUTS
from data.scene_inputs import Scene, add_mesh, check_mesh, open_scene
from data.scene_results import FOLDERS, PARTS, FoundScene, class_ids, time_table, write_scene
from models.esam import ESAM, ESAMConfig
from models.instance_merge import MODES
from models.scene_segmenter import Filters, SceneResult, SceneSegmenter
from utils import run
from utils.output_folder import results_into
from utils.run import UserError
from utils.segment_inputs import check_free
from utils.weights import write_sidecar


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="posed RGB-D frames, one folder a scene")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for predictions and pictures")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--layout", default="auto", choices=LAYOUTS, help="of the folders")
    p.add_argument("--intrinsics", default=None, metavar="FX,FY,CX,CY", help="px of the depth (default: the folder's)")
    p.add_argument("--depth-scale", type=float, default=None, help="units a metre (default: the layout's)")
    p.add_argument("--invalid", default="0,65535", help="values of depth that were not measured, joined by ','")
    p.add_argument("--up", default="auto", choices=["auto", "z"], help="where up is in the world; auto: by the cameras")
    p.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th frame")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N of them (0: all)")
    p.add_argument("--points", type=int, default=20000, help="points of a frame (0: all; fewer where it has fewer)")
    p.add_argument("--superpoints", default=None, metavar="DIR", help="masks of the pictures, DIR/[SCENE/]FRAME.png, "
                   ".npz or .json (default: segments of depth and colour)")  # fmt: skip
    p.add_argument("--merge", default=None, choices=MODES, help="how frames are merged (default: online; sv geometric)")
    p.add_argument(
        "--score", type=float, default=None, help="lowest score of a frame's instance (default: as released)"
    )
    p.add_argument("--min-points", type=int, default=100, help="a frame's instance has more points than this")
    p.add_argument("--top", type=int, default=100, help="objects of a scene that are written")
    p.add_argument("--mesh", default=None, metavar="PLY", help="predict on its vertices; {scene} stands for the name")
    p.add_argument("--segments", default=None, metavar="JSON", help="segs.json of the mesh; {scene} as in --mesh")
    p.add_argument("--turntable", action="store_true", help="also write a film of the turning scene")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- inputs


def open_scenes(args) -> list[Scene]:
    """UserError before any work is done."""
    run.check_ranges(args, every=(1, 10**6), limit=(0, 10**9), points=(0, 10**8), min_points=(0, 10**8), top=(1, 10**4))
    for flag, high in (("score", 0.999), ("depth_scale", 1e9)):
        if getattr(args, flag) is not None:
            run.check_ranges(args, **{flag: (1e-9 if flag == "depth_scale" else 0, high)})
    names = [Path(f).resolve().name for f in args.folders]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise UserError(f"FOLDER: several are called {min(twice)}; the name tells scenes apart, rename one")
    for flag in ("mesh", "segments"):
        value = getattr(args, flag)
        if value and len(names) > 1 and "{scene}" not in value:
            raise UserError(
                f"--{flag} {value}: is one file for {len(names)} scenes; put {{scene}} in place of the name"
            )
    if args.segments and not args.mesh:
        raise UserError("--segments: are those of a mesh; give it, too, as --mesh")
    check_free(Path(args.out), [*FOLDERS, "summary.json"])
    K = None if args.intrinsics is None else decimals("--intrinsics", args.intrinsics, 4)
    masks, invalid = args.superpoints and Path(args.superpoints), decimals("--invalid", args.invalid)
    how = (args.layout, K, args.depth_scale, invalid, args.every, args.limit, masks, args.up)
    scenes = [open_scene(Path(f), *how) for f in args.folders]
    for scene in scenes:
        add_mesh(scene, args.mesh, args.segments)
    return scenes


# ---- a scene


def segment_scene(args, segmenter: SceneSegmenter, scene: Scene, device: torch.device) -> list[dict]:
    """Push all frames -> a row of figures for each."""
    rows, cfg = [], segmenter.model.cfg
    segmenter.new_scene()
    for frame, cloud, seconds in scene.read(args.points):
        seen = cloud.centred() if cfg.stage == "sv" else cloud
        view = points_view(seen, picture=frame.colour if cfg.route == "bif" else None).to(device)
        found = segmenter.push(view, torch.from_numpy(cloud.xyz).to(device))
        seconds |= found.timings
        known = 0 if segmenter.merge.objects is None else len(segmenter.merge.objects)
        rows.append({
            "frame": frame.name, "points": len(cloud), "superpoints": int(cloud.superpoint.max()) + 1,
            "instances": len(found.ids), "new": len(found.new_ids), "objects": known,
            "memory_mb": round(segmenter.nbytes() / 1e6, 3), **{f"{k}_s": round(seconds[k], 5) for k in PARTS},
        })  # fmt: skip
    return rows


def as_found(scene: Scene, result: SceneResult, cfg: ESAMConfig) -> FoundScene:
    """What the files say about a scene, classes by their ids."""
    ids, labels = np.array(class_ids(cfg.classes)), result.objects.labels.cpu().numpy()
    objects = (getattr(result.objects, k).cpu().numpy() for k in ("ids", "scores", "boxes"))
    return FoundScene(
        scene.name, result.points, scene.mesh[1] if scene.mesh else result.colour, result.masks, result.point_ids(),
        ids[result.semantic], [cfg.thing_classes[k] for k in labels],
        np.ones_like(labels) if cfg.agnostic else ids[labels + cfg.n_stuff], *objects, scene.turn, scene.eyes(),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    scenes = open_scenes(args)
    model, r = ESAM.from_checkpoint(args.ckpt).eval(), run.start(args, argv)
    cfg = model.cfg
    if args.merge in ("online", "voted") and cfg.stage == "sv":
        raise UserError(
            f"--merge {args.merge}: {args.ckpt} is of stage sv, without merge vectors; use geometric or concat"
        )
    filters = replace(Filters.of("mv", cfg.agnostic or args.merge == "voted"), min_points=args.min_points)
    filters = filters if args.score is None else replace(filters, score_threshold=args.score)
    segmenter = SceneSegmenter(model.to(r.device), args.merge, filters, top=args.top, dtype=r.dtype)

    # ---- frames, files
    summary, spent = {}, []
    with results_into(Path(args.out), last="summary.json.meta.json") as staging:
        for scene in scenes:
            run.say(r, scene.folder.summary())
            rows = segment_scene(args, segmenter, scene, r.device)
            if scene.mesh:
                check_mesh(scene, segmenter.cloud.read()[0], args.mesh)
            found = as_found(scene, segmenter.result(*((scene.mesh[0], scene.segments) if scene.mesh else ())), cfg)
            write_scene(staging, found, rows, args.turntable)
            print(time_table(scene.name, rows))
            spent += [sum(row[f"{k}_s"] for k in PARTS) for row in rows]
            summary[scene.name] = {
                "frames": len(rows), "left_out": scene.folder.left_out, "turn": scene.turn.tolist(),
                "superpoints_per_frame": float(np.mean([row["superpoints"] for row in rows])),
                "objects": found.summary(),
            }  # fmt: skip
        run.write_text_atomic(staging / "summary.json", json.dumps({"scenes": summary}, indent=1) + "\n")
        about = {**vars(args), "model": model.config_dict(), "filters": vars(filters), "merge": segmenter.merge_mode}
        write_sidecar(staging / "summary.json", args.ckpt, about, [f for s in scenes for f in s.sources()])
    n = sum(len(s["objects"]) for s in summary.values())
    run.finish(r, args, "ESAM", f"{n} objects in {len(scenes)} scenes, {len(spent)} frames of "
               f"{1000 * np.median(spent):.0f} ms (median) -> {args.out}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
