"""models/sam3_losses.py by hand and against the model's own passes; train/train_tiny_sam3.py: exact resume, refusals."""

import functools
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.rendered_ball import TARGETS, RenderedBall, RenderedScenes
from models.sam3_losses import (
    LEAST_CELLS,
    DetectionWeights,
    Questions,
    bce_per_object,
    best_masks,
    boxes_of,
    detect_pairs,
    detection_losses,
    follow_clip,
    followed_masks,
    generalized_iou,
    shrink,
    tracking_losses,
)
from models.sam3_tiny import save_tiny_snapshot
from models.sam3_tracker import Sam3Engine
from utils import run

ROOT = Path(__file__).resolve().parents[1]
S = 32  # side of the model's masks


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rectangle(x0: int, y0: int, x1: int, y1: int, H: int = 64, W: int = 64) -> torch.Tensor:
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


# ---- losses


def answer(B: int = 1, Q: int = 3) -> SimpleNamespace:
    """An undecided detector: logits 0, boxes in the middle. Leaves that take gradients."""
    box = torch.tensor([0.4, 0.4, 0.6, 0.6]).repeat(B, Q, 1)
    tensors = {"pred_logits": torch.zeros(B, Q), "pred_boxes": box, "pred_masks": torch.zeros(B, Q, S, S)}
    tensors |= {"presence_logits": torch.zeros(B, 1), "semantic_seg": torch.zeros(B, 1, S, S)}
    return SimpleNamespace(**{k: v.requires_grad_() for k, v in tensors.items()})


def test_boxes_and_shrunk_masks():
    masks = torch.stack([rectangle(8, 16, 24, 20), rectangle(0, 0, 64, 64), rectangle(63, 63, 64, 64)])
    expected = [[8 / 64, 16 / 64, 24 / 64, 20 / 64], [0, 0, 1, 1], [63 / 64, 63 / 64, 1, 1]]
    assert torch.equal(boxes_of(masks), torch.tensor(expected))
    wide = rectangle(1, 2, 3, 5, H=10, W=20)[None]
    assert torch.allclose(boxes_of(wide), torch.tensor([[1 / 20, 2 / 10, 3 / 20, 5 / 10]]))
    small = shrink(masks, (S, S))
    assert small[0, 8:10, 4:12].eq(1).all() and small[0].sum() == 16 and small[2, 31, 31] == 0.25
    assert shrink(masks[:0], (S, S)).shape == (0, S, S) and boxes_of(masks[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="1 are empty"):
        boxes_of(torch.stack([masks[0], masks[0] & False]))


@pytest.mark.parametrize(
    "other, value",
    [
        ([0.0, 0.0, 0.5, 0.5], 1.0),
        ([0.5, 0.5, 1.0, 1.0], -0.5),  # they touch: nothing shared, half of the hull covered
        ([0.25, 0.0, 0.75, 0.5], 1 / 3),
        ([0.0, 0.0, 0.25, 0.25], 0.25),
        ([0.1, 0.1, 0.1, 0.1], 0.0),  # no area, inside
    ],
)
def test_generalized_iou_by_hand(other, value):
    found = generalized_iou(torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.tensor(other))
    assert found.item() == pytest.approx(value, abs=1e-6)


def test_bce_counts_an_object_alike_whatever_its_size():
    """Two objects missed with the same logit: 4 cells and 64, each loss per cell of the object."""
    targets = torch.zeros(2, S * S)
    targets[0, :4], targets[1, :64] = 1, 1
    loss = bce_per_object(torch.full((2, S * S), -8.0), targets)
    missed, quiet = math.log1p(math.exp(8)), math.log1p(math.exp(-8))
    for k, n in ((0, 4), (1, 64)):
        assert loss[k].item() == pytest.approx((n * missed + (S * S - n) * quiet) / (n + LEAST_CELLS), rel=1e-5)


def test_losses_of_an_undecided_answer_by_hand():
    mask = rectangle(8, 16, 24, 32)
    loss, parts = detection_losses(answer(2), [mask[None], mask[None][:0]])
    n, all_cells = 8 * 8, S * S
    bce = math.log(2) * all_cells / (n + LEAST_CELLS)
    empty = math.log(2) * all_cells / LEAST_CELLS
    dice = 1 - (n + 1) / (all_cells / 2 + n + 1)
    box = torch.tensor([[8 / 64, 16 / 64, 24 / 64, 32 / 64]])
    expected = {
        "score": (math.log(2) + math.log(2) / 2) / 2,  # without an object only the zeros count, one half
        "mask": bce, "dice": dice, "box": (torch.tensor([0.4, 0.4, 0.6, 0.6]) - box).abs().sum().item(),
        "giou": 1 - generalized_iou(torch.tensor([0.4, 0.4, 0.6, 0.6]), box[0]).item(), "presence": math.log(2),
        "semantic_mask": (bce + empty) / 2, "semantic_dice": dice,
    }  # fmt: skip
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-5)
    weights = DetectionWeights()
    assert loss.item() == pytest.approx(sum(getattr(weights, k) * v for k, v in expected.items()), rel=1e-5)


def test_the_query_that_fits_answers_for_the_object_and_the_others_for_nothing():
    """Two objects, three queries whose masks are both objects and something else, in every order."""
    masks = torch.stack([rectangle(4, 4, 20, 20), rectangle(40, 30, 60, 50)])
    drawn = torch.stack([*masks, rectangle(0, 50, 10, 64)])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        out = answer()
        with torch.no_grad():
            out.pred_masks[0] = 16 * shrink(drawn[order], (S, S)) - 8
            out.pred_boxes[0] = boxes_of(drawn[order])
        loss, parts = detection_losses(out, [masks])
        assert parts["dice"] < 0.03 and parts["mask"] < 0.05 and parts["box"] < 1e-6 and parts["giou"] < 1e-6
        loss.backward()
        wants = out.pred_logits.grad[0] < 0  # descent raises these
        assert wants.tolist() == [k < 2 for k in order]


def test_without_any_object_losses_are_finite_and_masks_learn_nothing_but_to_be_empty():
    out = answer(2)
    loss, parts = detection_losses(out, [torch.zeros(0, 64, 64, dtype=torch.bool)] * 2)
    loss.backward()
    assert all(v.isfinite() for v in parts.values()) and parts["dice"] == parts["mask"] == parts["semantic_dice"] == 0
    assert (out.pred_masks.grad == 0).all() and (out.pred_boxes.grad == 0).all()
    assert (out.presence_logits.grad > 0).all() and (out.semantic_seg.grad > 0).all()


def test_a_wrong_number_of_targets():
    with pytest.raises(ValueError, match="1 targets for 2 pairs"):
        detection_losses(answer(2), [rectangle(0, 0, 4, 4)[None]])


def test_tracking_losses_teach_the_best_of_three_masks():
    """T - 1 = 2 frames of one object that is hidden in the second: only the best mask of the first learns its form."""
    truth = torch.stack([rectangle(8, 8, 24, 24), rectangle(0, 0, 0, 0)])[:, None]
    masks = torch.zeros(2, 1, 3, S, S)
    masks[0, 0, 1] = 8 * shrink(truth[0], (S, S))[0] - 4
    found = {"masks": masks.requires_grad_(), "iou": torch.full((2, 1, 3), 0.5), "object_logit": torch.zeros(2, 1)}
    found["iou"].requires_grad_(), found["object_logit"].requires_grad_()
    loss, parts = tracking_losses(found, truth)
    loss.backward()
    learns = masks.grad.flatten(2).abs().flatten(0, 1).reshape(2, 3, -1).amax(2) > 0
    assert learns.tolist() == [[False, True, False], [False, False, False]]
    true_iou = [0.0, 1.0, 0.0]  # logits of 0 cover nothing
    assert parts["iou"].item() == pytest.approx(np.mean([(0.5 - v) ** 2 for v in true_iou]))
    assert found["object_logit"].grad[0] < 0 < found["object_logit"].grad[1]
    assert (found["iou"].grad[1] == 0).all()


# ---- against the model's own passes


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Sam3Engine:
    """A random model whose tracker answers differently for different seeds."""
    folder = save_tiny_snapshot(tmp_path_factory.mktemp("sam3") / "tiny")
    engine = Sam3Engine.open(folder, torch.float32, "cpu")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in engine.model.named_parameters():
            if name.startswith(("tracker_model", "tracker_neck")):
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        engine.model.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias += 0.3  # now seen, now hidden
    return engine


def questions(engine: Sam3Engine) -> Questions:
    return Questions(engine.processor, [("ball", "tennis ball"), ("racket", "tennis racket")], torch.device("cpu"))


def test_pairs_of_a_batch_are_the_pairs_one_by_one(engine):
    """Tolerance 1e-5; the frames go through the engine's own preparation there."""
    ask, detector = questions(engine), engine.model.detector_model
    frames = np.stack([RenderedBall(0).picture(i)["image"] for i in range(3)])
    texts = torch.tensor([[0, 2], [1, 3], [0, 3]])
    with torch.no_grad():
        out = detect_pairs(detector, ask.pixels(torch.from_numpy(frames)), ask.tokens, texts)
        for i in range(3):
            vision = engine.encode(frames[i]).vision
            for j in range(2):
                text, attention = engine.text(["ball", "tennis ball", "racket", "tennis racket"][texts[i, j]])
                one = detector(vision_embeds=vision, text_embeds=text, attention_mask=attention)
                for name in ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg"):
                    assert (getattr(out, name)[2 * i + j] - getattr(one, name)[0]).abs().max() < 1e-5, name


def test_best_masks_are_the_engines_best(engine):
    """Of a random model whose holes and specks are left alone, above a threshold that some pass and some do not."""
    ask, source, seen = questions(engine), RenderedBall(1), 0
    clean, engine.model.fill_hole_area = engine.model.fill_hole_area, 0
    for i in range(4):
        x = RenderedScenes(source, 4)[0, i]
        with torch.no_grad():
            out = detect_pairs(engine.model.detector_model, ask.pixels(x["image"]), ask.tokens, ask.plain(1))
        for threshold in (0.0, 0.25, 0.9):
            ours = best_masks(out, (96, 128), threshold)
            theirs = engine.detect(engine.encode(x["image"][0].numpy()), list(TARGETS), threshold)
            for a, b in zip(ours.numpy(), theirs, strict=True):
                assert a.any() == (len(b.masks) > 0)
                assert not a.any() or np.array_equal(a, b.masks[0])
                seen += a.any()
    engine.model.fill_hole_area = clean
    assert seen


def test_the_unrolled_tracker_is_the_session(engine):
    """Four objects of two clips together, two of them against a session each, through 18 frames: more than pointers
    reach back. Tolerance 1e-3 of the logits' spread: memories are bf16, and what differs in the last bit of fp32 may be
    rounded apart. The seeds matter: another object's answer is much further away than that."""
    source, T, ask = RenderedBall(3, absent=0, hiding=0), 18, questions(engine)
    clips = [source.clip(i, T) for i in range(2)]
    image = torch.from_numpy(np.stack([x["frames"] for x in clips]))
    seeds = torch.from_numpy(np.stack([x["masks"][name][0] for x in clips for name in TARGETS]))
    with torch.no_grad():
        found = follow_clip(engine.model, ask.picture_tokens(engine.model, image), torch.tensor([0, 0, 1, 1]), seeds)
    shown = followed_masks(found, (96, 128))
    clean, engine.model.fill_hole_area = engine.model.fill_hole_area, 0
    both = {True: 0, False: 0}
    for k in (0, 3):  # a ball and a racket, of two clips
        session = engine.session((96, 128))
        for t, frame in enumerate(clips[k // 2]["frames"]):
            features = engine.encode(frame)
            if t == 0:
                session.seed(features, 0, 1, mask=seeds[k].numpy())
                continue
            theirs = session.track(features, t)[1]
            ours, chosen = found["object_logit"][t - 1, k].item(), found["chosen"][t - 1, k]
            assert ours == pytest.approx(theirs.object_logit, abs=1e-3)
            both[ours > 0] += 1
            if ours > 0:
                answer = found["masks"][t - 1, k, chosen].numpy()
                assert abs(answer - theirs.logits).max() < 1e-3 * max(1, answer.std())
            assert (shown[t - 1, k].numpy() != theirs.mask).mean() < 1e-3
    engine.model.fill_hole_area = clean
    for k, other in ((0, 1), (3, 2)):  # the other object of the same clip
        assert (found["masks"][:, k] - found["masks"][:, other]).abs().max() > 1e-2
    assert min(both.values()) > 0, both


# ---- runs


def flags(out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced, as seed=1; None: left out."""
    options = {"out": out, "device": "cpu", "batch_size": 2, "steps": 4, "print_every": 1, "warmup": 2}
    options |= {"val_items": 2, "size": "32x40", "frames": 3}
    words = []
    for name, value in (options | more).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(out: Path, /, **more) -> Path:
    assert run.cli(script("train/train_tiny_sam3.py").main, flags(out, **more)) == 0
    return out


def refused(capsys, out: Path, /, **more) -> str:
    """The sentence of a run that must be refused."""
    capsys.readouterr()
    assert run.cli(script("train/train_tiny_sam3.py").main, flags(out, **more)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """Runs without curves.png, which takes longer than a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script("train/train_tiny_sam3.py"), "curves", lambda *_: None)
        yield


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "items_per_s"} for row in run.read_metrics(out)]


def assert_same(a: Path, b: Path) -> None:
    """Weights, and all that a continuation needs."""
    one, two = (load_file(out / "last" / "model.safetensors") for out in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    s, t = (run.load_state(out / "last") for out in (a, b))
    assert s["best"] == t["best"] and str(s["optimizer"]) == str(t["optimizer"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("sam3") / "run", val_every=2)


def changed(a: Path, b: Path) -> set[str]:
    """Second names of the tensors that differ: detector_model.detr_decoder, tracker_neck.fpn_layers, ..."""
    one, two = (load_file(x / "model.safetensors") for x in (a, b))
    return {".".join(k.split(".")[:2]) for k in one if not torch.equal(one[k], two[k])}


def test_the_run_and_its_snapshot(trained, capsys):
    rows = metrics(trained)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    val = [r for r in rows if "ball_recall" in r]
    assert [r["step"] for r in val] == [2, 4]
    assert set(val[0]) == {"step"} | {f"{n}_{k}" for n in TARGETS for k in ("precision", "recall", "iou")}
    for name in ("val.png", "metrics.csv", "run.json", "last/state.pt", "best/config.json", "snapshot/tokenizer.json"):
        assert (trained / name).stat().st_size > 50, name
    engine = Sam3Engine.open(trained / "snapshot", torch.float32, "cpu")
    last = load_file(trained / "last" / "model.safetensors")
    state = engine.model.state_dict()
    assert state.keys() == last.keys() and all(torch.equal(state[k], last[k]) for k in last)


def test_each_part_changes_its_own_weights_only(trained, tmp_path, capsys):
    fresh = save_tiny_snapshot(tmp_path / "fresh")
    begun = train(tmp_path / "begun", init=fresh, steps=1, lr=1e-7)
    kept = changed(begun / "last", trained / "last")
    assert "tracker_neck.fpn_layers" in kept  # gets what the detector's has learned
    assert all(k.startswith("detector_model.") for k in kept - {"tracker_neck.fpn_layers"})
    state = load_file(trained / "last" / "model.safetensors")
    necks = [{k.split("fpn_layers.")[1]: v for k, v in state.items() if k.startswith(x)}
             for x in ("tracker_neck.", "detector_model.vision_encoder.neck.")]  # fmt: skip
    assert necks[0].keys() == necks[1].keys() and all(torch.equal(v, necks[1][k]) for k, v in necks[0].items())
    assert "detector_model.geometry_encoder" not in kept and "detector_model.vision_encoder" in kept
    out = train(tmp_path / "tracker", part="tracker", init=trained / "snapshot", steps=2)
    moved = changed(trained / "last", out / "last")
    assert {"tracker_model.memory_attention", "tracker_model.memory_encoder", "tracker_model.mask_decoder"} <= moved
    assert all(k.startswith("tracker_model") for k in moved)
    assert "parameters learn" in capsys.readouterr().out
    Sam3Engine.open(out / "snapshot", torch.float32, "cpu")


@pytest.mark.parametrize("part", ["detector", "tracker"])
def test_resume_is_exact(trained, tmp_path, part):
    more = {"part": part, "init": trained / "snapshot", "steps": 2, "val_items": 1}
    whole = train(tmp_path / "whole", **more)
    out = train(tmp_path / "part", stop_at=1, **more)
    train(out, resume="auto", **more)
    assert_same(whole, out)
    assert metrics(whole) == metrics(out)


def test_micro_batches_and_workers(tmp_path):
    """--accum 2 is a mean of losses; worker processes do not change the numbers."""
    two = train(tmp_path / "two", accum=2, steps=1, val_items=1)
    assert all(math.isfinite(v) for v in metrics(two)[0].values())
    one = train(tmp_path / "one", steps=1, val_items=1)
    assert_same(one, train(tmp_path / "workers", steps=1, workers=1, val_items=1))


def test_overfit_takes_the_first_items_again_and_again(tmp_path, monkeypatch):
    drawn, render = [], RenderedScenes.__getitem__
    monkeypatch.setattr(RenderedScenes, "__getitem__", lambda self, key: drawn.append(key[1]) or render(self, key))
    out = train(tmp_path / "run", overfit=2, steps=2)
    assert set(drawn) == {0, 1} and "2 " not in metrics(out)
    assert all(
        torch.equal(RenderedScenes(RenderedBall(0), 2, fixed=True)[e, 1]["image"],
                    RenderedScenes(RenderedBall(0), 2, fixed=True)[0, 1]["image"]) for e in (1, 5)
    )  # fmt: skip
    fresh = RenderedScenes(RenderedBall(0), 2)
    assert not torch.equal(fresh[1, 1]["image"], fresh[0, 1]["image"])


def test_validation_counts(monkeypatch):
    """Four pictures of a ball: right, 5 px off, missed, and one that is not there but found; and a racket."""
    module = script("train/train_tiny_sam3.py")
    ball, off, none = rectangle(10, 10, 14, 14), rectangle(10, 15, 14, 19), rectangle(0, 0, 0, 0)
    rows = [(ball, ball), (off, ball), (none, ball), (ball, none)]
    items = [{"image": torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}] * 4

    class Items(list):
        def __getitem__(self, key):
            return {**items[key[1]], "i": key[1]}

    def found_by(model, x, ask):
        a, b = rows[x["i"]]
        return torch.stack([a, ball])[None], torch.stack([b, ball])[None]

    values, shown = module.validate(None, Items(range(4)), found_by, None)
    assert values["ball_precision"] == pytest.approx(1 / 3) and values["ball_recall"] == pytest.approx(1 / 3)
    assert values["ball_iou"] == pytest.approx(1 / 3) and values["racket_precision"] == values["racket_recall"] == 1
    assert len(shown) == 4


# ---- refusals


@pytest.mark.parametrize(
    "more, said",
    [
        ({"lr": 0.1}, "--lr 0.1"),
        ({"steps": 0}, "--steps 0"),
        ({"size": "96"}, "--size 96"),
        ({"size": "8x128"}, "32..1024"),
        ({"frames": 1}, "--frames 1"),
        ({"stop_at": -1}, "--stop-at -1"),
        ({"part": "tracker"}, "--part tracker"),
        ({"init": "nowhere"}, "not a checkpoint folder"),
        ({"dtype": "fp16"}, "half precision needs a GPU"),
    ],
    ids=str,
)
def test_flags_that_no_run_can_have(tmp_path, capsys, more, said):
    assert said in refused(capsys, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    start = run.start
    monkeypatch.setattr(run, "start", lambda *args: SimpleNamespace(**{**vars(start(*args)), "ddp": True}))
    assert "torchrun" in refused(capsys, tmp_path / "run")


def test_other_flags_other_models_and_other_runs_are_refused(trained, tmp_path, capsys):
    assert "--warmup 2" in refused(capsys, trained, val_every=2, resume=trained / "last", warmup=3)
    assert "holds another run" in refused(capsys, trained)
    other = save_tiny_snapshot(tmp_path / "other", words=("ball",))
    assert "does not fit" in refused(capsys, tmp_path / "run", init=other)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch):
    module = script("train/train_tiny_sam3.py")
    losses, calls = module.detection_losses, []

    def second_is_nan(*args):
        calls.append(args)
        loss, parts = losses(*args)
        return loss * (math.nan if len(calls) == 2 else 1), parts

    monkeypatch.setattr(module, "detection_losses", second_is_nan)
    assert "step 2: loss is nan" in refused(capsys, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()
