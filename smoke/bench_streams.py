"""Time FastSAM2 following objects through a video: part by part, over a long stream, beside SAM 2.1 and EdgeTAM.

    python smoke/bench_streams.py                                                    # laptop, one thread: 20 s
    python smoke/bench_streams.py --backbone resnet50 --size 640x640 --frames 10     # 2 min
    python smoke/bench_streams.py --size 128x128 --frames 5 --long 500               # does anything grow? 1 min
    python smoke/bench_streams.py --backbone resnet18 resnet50 --peers               # 3 min
    python smoke/bench_streams.py --device cuda --dtype bf16 --compile --backbone resnet50 --size 720x1280 --frames 100

Random weights, frames of noise, every object pointed at in the first frame. Each cell: p50 / p95 in ms, on a CPU of one
thread as process time, on a GPU from the call to finished work; first frames are not counted. Objects have as many
places as there are objects, Stream.step always computes them in blocks of 8.
    encode      bytes -> features, once for all objects
    read        the memory before the decoder; decode: queries -> masks; write: presence, and the memory after it
    masks       at the frame's size, on the CPU
    frame       all of that; x: times that of the fewest objects, which has a bar of 2 for 1 and 8 objects
    stream      Stream.step, from the frame to its results
--long N: Stream.step on N frames with the most objects; what is held at frame 50 and at the end, bar 1 % of growth.
--peers: Stream.step beside transformers' Sam2VideoModel (SAM 2.1 tiny) and EdgeTamVideoModel (RepViT-M1, needs timm) of
their real sizes as they are, uncompiled, which take one object after the other and keep every frame; all take turns
frame by frame, from bytes to masks at the frame's size. MiB: what a stream holds, counted in its tensors.
"""

import argparse
import gc
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.fastsam2 import BACKBONES, STRIDE, FastSAM2, FastSAM2Config
from models.panoptic_post import ImageSize, to_original
from models.segment_stream import Stream
from models.streaming_memory import MemoryConfig, MemoryState
from utils import run

PARTS = ("encode", "read", "decode", "write", "masks")
WARM_UP, SETTLED, HUNDRED, MIB = 2, 50, 100, 2**20
FULL = 8  # frames until the memory of every peer is as long as it gets, but for object pointers
PEER_SIDE = 256  # px; EdgeTAM's 16 x 16 latents divide a grid of 16 px cells
REPVIT = transformers.TimmWrapperConfig(  # named, for transformers' default at this place is a ResNet50
    architecture="repvit_m1", model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
)
PEERS = {  # name -> classes, and what differs from their default configuration
    "SAM 2.1 tiny": (transformers.Sam2VideoConfig, transformers.Sam2VideoModel, transformers.Sam2VideoInferenceSession,
                     {"model_type": "sam2_vision_model"}),
    "EdgeTAM": (transformers.EdgeTamVideoConfig, transformers.EdgeTamVideoModel,
                transformers.EdgeTamVideoInferenceSession,
                {"model_type": "edgetam_vision_model", "backbone_config": REPVIT}),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--backbone", nargs="+", default=["resnet18"], choices=list(BACKBONES), help="a table each")
    p.add_argument("--size", default="256x256", metavar="HxW", help="pixels of the frames (default 256x256)")
    p.add_argument("--objects", type=int, nargs="+", default=[1, 8], metavar="N", help="numbers of objects, ascending")
    p.add_argument("--memory-maps", type=int, default=0, help="frames held as maps too (default 0: tokens only)")
    p.add_argument("--frames", type=int, default=20, help="timed frames of each row (default 20)")
    p.add_argument("--compile", action="store_true", help="torch.compile FastSAM2's parts without a break")
    p.add_argument("--long", type=int, default=0, metavar="N", help="also a stream of N frames, 200 or more")
    p.add_argument("--peers", action="store_true", help="also beside SAM 2.1 tiny and EdgeTAM")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- networks


def make_fastsam2(backbone: str, maps: int, r, compiled: bool) -> FastSAM2:
    """On the device; compiled: the parts that run on every frame, in place."""
    dim = FastSAM2Config.dim
    memory = MemoryConfig(dim, FastSAM2Config.heads, 4 * dim, maps=maps)
    model = FastSAM2(FastSAM2Config(backbone=backbone, memory=memory)).to(r.device).eval()
    if compiled:
        for owner, names in ((model, ("encode", "decode")), (model.memory, ("read", "presence", "write"))):
            for name in names:
                setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, dynamic=False))
    return model


def make_peer(name: str, side: int) -> tuple[nn.Module, type]:
    """One of PEERS for frames of side x side px, and the class of its sessions. ImportError where a package is
    missing."""
    config, model, session, vision = PEERS[name]
    vision = vision | {"backbone_feature_sizes": [[side // k] * 2 for k in (4, 8, 16)]}
    sizes = {"image_size": side, "prompt_encoder_config": {"image_size": side}}
    return model(config(vision_config=vision, memory_attention_rope_feat_sizes=[side // 16] * 2, **sizes)), session


# ---- streams


def clicks(P: int, size: tuple[int, int]) -> list[list[float]]:
    """One click (x, y) px for each of P objects."""
    H, W = size
    return [[(k + 1) * W / (P + 1), H / 2] for k in range(P)]


def start_stream(model: FastSAM2, P: int, size: tuple[int, int], r) -> Stream:
    stream = Stream(model, dtype=r.dtype)
    for k, (x, y) in enumerate(clicks(P, size)):
        stream.add(k, points=[[x, y, 1]])
    return stream


class PeerStream:
    """A model of transformers in streaming use, called as Stream is: step(frame uint8 (H, W, 3)) -> masks (P, H, W)."""

    def __init__(self, model: nn.Module, session: type, P: int, size: tuple[int, int], r):
        self.model, self.r = model, r
        H, W = size
        self.session = session(video_height=H, video_width=W, inference_device=r.device,
                               inference_state_device=r.device, video_storage_device=r.device, dtype=torch.float32)  # fmt: skip
        for k, (x, y) in enumerate(clicks(P, size)):
            points = {
                "point_coords": torch.tensor([[[[x, y]]]]),
                "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
            }
            self.session.add_point_inputs(self.session.obj_id_to_idx(k), 0, points)
            self.session.obj_with_new_inputs.append(k)
        self.mean, self.std = (torch.tensor(x, device=r.device)[:, None, None]
                               for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # fmt: skip

    @torch.no_grad()
    def step(self, frame: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(frame).to(self.r.device).permute(2, 0, 1)[None]
        with torch.autocast(self.r.device.type, self.r.dtype, enabled=self.r.dtype != torch.float32):
            out = self.model(inference_session=self.session, frame=(image / 255.0 - self.mean) / self.std)
        masks = F.interpolate(out.pred_masks.float(), frame.shape[:2], mode="bilinear", align_corners=False)
        return (masks[:, 0] > 0).cpu().numpy()


def held(thing, seen: set | None = None) -> int:
    """Bytes of the tensors and arrays that an object holds, each once; networks do not count."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        thing = thing.untyped_storage()
    storage = isinstance(thing, torch.UntypedStorage)
    key = ("storage", thing.data_ptr()) if storage else id(thing)
    if key in seen or isinstance(thing, nn.Module | type):
        return 0
    seen.add(key)
    if storage or isinstance(thing, np.ndarray):
        return thing.nbytes() if storage else thing.nbytes
    if isinstance(thing, list | tuple | set):
        return sum(held(x, seen) for x in thing)
    inside = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    return sum(held(x, seen) for x in inside.values())


# ---- measurement


def clock(r) -> float:
    """ms; on a GPU its work is done."""
    if r.device.type == "cuda":
        torch.cuda.synchronize(r.device)
    return 1e3 * (time.process_time() if r.device.type == "cpu" else time.perf_counter())


def p50(times: list[float]) -> float:
    return float(np.median(times))


def cell(times: list[float]) -> str:
    return f"{p50(times):.1f} / {np.quantile(times, 0.95):.1f}"


def step_parts(model: FastSAM2, image: torch.Tensor, state: MemoryState, r) -> tuple[MemoryState, dict]:
    """One frame, uint8 (1, 3, H, W), of all objects -> the new state and the ms of PARTS."""
    marks = [clock(r)]

    def decode(features: torch.Tensor, queries: torch.Tensor) -> dict:
        marks.append(clock(r))
        out = model.decode(features, queries, objects=False)
        marks.append(clock(r))
        return out

    size = tuple(image.shape[-2:])
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        features = model.encode(image)
        marks.append(clock(r))
        state, found = model.memory.step(state, features, decode)
    marks.append(clock(r))
    padded = tuple(4 * n for n in features.shape[-2:])
    (to_original(found.masks.flatten(0, 1), ImageSize(size, size, padded)) > 0).cpu()
    marks.append(clock(r))
    return state, {name: b - a for name, a, b in zip(PARTS, marks, marks[1:], strict=False)}


@torch.no_grad()
def time_parts(model: FastSAM2, frames: list[np.ndarray], P: int, count: int, r) -> dict[str, list[float]]:
    """Times in ms of PARTS, the whole frame, and Stream.step, for P objects."""
    H, W = frames[0].shape[:2]
    grid = (-(-H // STRIDE) * STRIDE // 4, -(-W // STRIDE) * STRIDE // 4)
    state = model.memory.start(1, P, grid)
    every = torch.ones(1, P, dtype=torch.bool, device=r.device)
    state = model.memory.point(state, torch.randn(1, P, model.cfg.dim, device=r.device), every)
    images = [torch.from_numpy(f).to(r.device).permute(2, 0, 1)[None] for f in frames]
    stream, times = start_stream(model, P, (H, W), r), {name: [] for name in (*PARTS, "frame", "stream")}
    for t in range(WARM_UP + count):
        state, took = step_parts(model, images[t % len(images)], state, r)
        start = clock(r)
        stream.step(frames[t % len(frames)])
        took |= {"frame": sum(took.values()), "stream": clock(r) - start}
        for name, ms in took.items():
            times[name] += [ms] if t >= WARM_UP else []
    return times


def parts_table(times: dict[int, dict[str, list[float]]]) -> str:
    """{objects: times of time_parts} -> a line for each part."""
    few, many = min(times), max(times)
    heads = (f"{P} object{'s' * (P > 1)}" for P in times)
    lines = [" | ".join([f"{'p50 / p95 in ms':15s}", *(f"{head:>17s}" for head in heads), "ms per extra object, x"])]
    for name in times[few]:
        a, b = (p50(times[P][name]) for P in (few, many))
        extra = f"{(b - a) / (many - few):.2f}, {b / a:.2f}" if many > few else "-"
        lines.append(" | ".join([f"{name:15s}", *(f"{cell(times[P][name]):>17s}" for P in times), extra]))
    return "\n".join(lines)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say (only Linux does)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.is_file() else 0


def long_stream(model: FastSAM2, frames: list[np.ndarray], P: int, count: int, r) -> list[str]:
    """Two sentences about a stream of `count` frames: what it holds, and its times."""
    stream, took, seen = start_stream(model, P, frames[0].shape[:2], r), [], []
    for t in range(count):
        start = clock(r)
        stream.step(frames[t % len(frames)])
        took.append(clock(r) - start)
        if t + 1 in (SETTLED, count):
            gc.collect()
            cuda = torch.cuda.memory_allocated(r.device) if r.device.type == "cuda" else 0
            seen.append({"state": stream.state_bytes, "stream": held(stream), "process": resident(), "GPU": cuda})
    first, last = seen
    grown = {name: 100 * (last[name] / first[name] - 1) for name in first if first[name]}
    sizes = [f"{name} {last[name] / MIB:.2f} MiB ({growth:+.2f} %)" for name, growth in grown.items()]
    bar = "kept" if max(grown.values()) < 1 else "MISSED"
    line = f"{count} frames, {P} objects: at the end (since frame {SETTLED}) {', '.join(sizes)}; bar of 1 % {bar}"
    return [line, f"first {HUNDRED} frames {cell(took[:HUNDRED])} ms, last {cell(took[-HUNDRED:])} ms"]


@torch.no_grad()
def peers_table(models: dict[str, FastSAM2], frames: list[np.ndarray], numbers: list[int], count: int, r) -> list[str]:
    """A head, a row for each network and number of objects, and a line for each peer that cannot be built."""
    networks, left_out = {f"FastSAM2 {name}": (model, None) for name, model in models.items()}, []
    for name in PEERS:
        try:
            model, session = make_peer(name, len(frames[0]))
            networks[name] = (model.to(r.device).eval(), session)
        except ImportError as e:
            left_out.append(f"{name}: left out: {' '.join(str(e).split())}")
    lines = [f"{'':20s} | {'M parameters':>12s} | objects | {'p50 / p95 in ms':>17s} | MiB at the end | MiB per frame"]
    for P in numbers:
        size, took, bytes_ = frames[0].shape[:2], {name: [] for name in networks}, {name: [] for name in networks}
        streams = {name: PeerStream(model, session, P, size, r) if session else start_stream(model, P, size, r)
                   for name, (model, session) in networks.items()}  # fmt: skip
        for t in range(FULL + count):
            for name, stream in streams.items():
                start = clock(r)
                stream.step(frames[t % len(frames)])
                took[name] += [clock(r) - start] if t >= FULL else []
                bytes_[name] += [held(stream) / MIB] if t >= FULL - 1 else []
        for name, (model, _) in networks.items():
            number, (a, *_, b) = sum(p.numel() for p in model.parameters()) / 1e6, bytes_[name]
            cells = [f"{name:20s}", f"{number:12.1f}", f"{P:7d}", f"{cell(took[name]):>17s}", f"{b:14.2f}"]
            lines.append(" | ".join([*cells, f"{(b - a) / count:.3f}"]))
    return [*lines, *left_out]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, frames=(1, 100_000), memory_maps=(0, MemoryConfig.recent), long=(0, 1_000_000))
    size = tuple(run.numbers("--size", args.size, "x", 2))
    if min(size) < STRIDE or (args.peers and (size[0] != size[1] or size[0] % PEER_SIDE)):
        raise run.UserError(f"--size {args.size}: expected at least {STRIDE} pixels to each side, with --peers a square "
                            f"of a multiple of {PEER_SIDE}")  # fmt: skip
    if args.objects != sorted({*args.objects}) or args.objects[0] < 1:
        raise run.UserError(f"--objects {' '.join(map(str, args.objects))}: expected ascending numbers from 1")
    if 0 < args.long < 2 * HUNDRED:
        raise run.UserError(f"--long {args.long}: expected at least {2 * HUNDRED} frames")
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(8)]
    models = {name: make_fastsam2(name, args.memory_maps, r, args.compile) for name in args.backbone}

    # ---- a table for each backbone
    results = []
    for name, model in models.items():
        run.say(r, f"# {name}, {size[0]} x {size[1]} px, {args.memory_maps} maps")
        times = {P: time_parts(model, frames, P, args.frames, r) for P in args.objects}
        run.say(r, parts_table(times))
        each = [f"{P} object{'s' * (P > 1)} {p50(t['frame']):.1f} ms" for P, t in times.items()]
        results.append(f"{name} {', '.join(each)}")
        if args.long:
            sentences = long_stream(model, frames, args.objects[-1], args.long, r)
            run.say(r, "\n".join(sentences))
            results += sentences
    if args.peers:
        lines = peers_table(models, frames, args.objects, args.frames, r)
        run.say(r, "\n".join(lines))
        results += [" ".join(line.replace("|", ",").split()) for line in lines]

    # ---- result
    how = f"streams of {args.size}, {args.dtype}{', compiled' if args.compile else ''}, {args.memory_maps} maps, p50"
    run.finish(r, args, "FastSAM2", f"{how}: {'; '.join(results)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
