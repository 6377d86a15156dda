"""Matrix suppression and online merging against ESAM's own modules.

Reads LAB_SHARED/data/esam/module_cases: matrix_nms_*, online_merge_*, whatever lies there; sizes come from the files.
Tolerance 1e-6 absolute (float32); masks, labels and order are equal.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models import instance_merge as im

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"


def cases(kind: str) -> list[tuple[str, dict[str, torch.Tensor]]]:
    found = sorted((SHARED / "module_cases").glob(f"{kind}*.npz"))
    if not found:
        pytest.skip(f"no reference cases {kind}* in {SHARED}; set LAB_SHARED")
    return [(p.stem, {k: torch.from_numpy(v) for k, v in np.load(p).items()}) for p in found]


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_matrix_nms(capsys):
    found = cases("matrix_nms_")
    for name, z in found:
        scores, order = im.matrix_nms(z["masks"], z["labels"], z["scores"], kernel=name.removeprefix("matrix_nms_"))
        close(scores, z["out_scores"])
        assert order.tolist() == z["keep"].tolist()
        close(z["masks"][order], z["out_masks"])
        assert z["labels"][order].tolist() == z["out_labels"].tolist()
    tell(capsys, f"matrix suppression: {len(found)} of {len(found)} cases to 1e-6")


def test_online_merge(capsys):
    found = cases("online_merge_")
    for _, z in found:
        merge = im.OnlineMerge(top=int(z["topk"]))
        for t in range(int(z["frames"])):
            own = {k.removeprefix(f"f{t}.in."): v for k, v in z.items() if k.startswith(f"f{t}.in.")}
            merge.push(
                im.FrameInstances(
                    masks=own["masks"],
                    labels=own["labels"],
                    scores=own["scores"],
                    vectors=own["query_feats"],
                    boxes=im.box_corners(own["xyz"], own["bboxes"]),
                    queries=own["queries"],
                    logits=own["sem_preds"],
                )
            )
            got = merge.result()
            assert (got.masks == z[f"f{t}.out.masks"].numpy()).all()
            assert got.objects.labels.tolist() == z[f"f{t}.out.labels"].tolist()
            for name in ("scores", "queries", "boxes"):
                close(getattr(got.objects, name), z[f"f{t}.out.{name}"])
    tell(capsys, f"online merging: {len(found)} of {len(found)} cases to 1e-6")
