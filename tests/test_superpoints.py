"""data/superpoints.py: graph segmentation, meshes as ScanNet's Segmentator, depth pictures, masks, the oracle.

Reads LAB_SHARED/data/esam: eval_cases/mesh_segmentation (partitions must be equal) and the frames of rgbd_7scenes.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab

from data import superpoints as sp
from utils.masks import rle_encode
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
K = np.array([[240.0, 0, 159.5], [0, 240, 119.5], [0, 0, 1]])
H, W = 240, 320


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


# ---- graph and mesh


def test_meshes_as_segmentator(capsys):
    found = sorted((SHARED / "eval_cases" / "mesh_segmentation").glob("*.npz"))
    if not found:
        pytest.skip(f"no reference cases mesh_segmentation in {SHARED}; set LAB_SHARED")
    for path in found:
        z = np.load(path)
        got = sp.segment_mesh(z["vertices"], z["faces"], float(z["kthresh"]), int(z["min_verts"]))
        assert same_partition(got, z["seg_indices"]), path.stem
        assert np.array_equal(np.unique(got), np.arange(got.max() + 1))
    tell(capsys, f"mesh segmentation: {len(found)} of {len(found)} partitions equal")


def plain_graph(n, a, b, w, k, min_size):
    """Groups as sets of nodes."""
    group, limit = {i: frozenset([i]) for i in range(n)}, {frozenset([i]): np.float32(k) for i in range(n)}
    order = np.argsort(w, kind="stable")
    for second in (False, True):
        for e in order:
            x, y = group[a[e]], group[b[e]]
            if x == y:
                continue
            if (min(len(x), len(y)) < min_size) if second else (w[e] <= limit[x] and w[e] <= limit[y]):
                both = x | y
                limit[both] = w[e] + np.float32(k) / np.float32(len(both))
                group |= dict.fromkeys(both, both)
    return np.array([min(group[i]) for i in range(n)])


@pytest.mark.parametrize(("k", "min_size"), [(0.05, 1), (0.3, 4), (2.0, 8)])
def test_segment_graph_is_the_rule(k, min_size):
    rng = np.random.default_rng(int(k * 100))
    n, m = 70, 160
    a, b, w = rng.integers(0, n, m), rng.integers(0, n, m), rng.random(m).astype(np.float32).round(2)
    got = sp.segment_graph(n, a, b, w, k, min_size)
    want = plain_graph(n, a, b, w, k, min_size)
    assert same_partition(got, want) and 1 < got.max() < n - 1


def test_a_cube_has_six_sides_and_a_loose_vertex_is_its_own_segment():
    """Creases are convex, so only a small k keeps the sides apart; each side has vertices of its own at 9 x 9."""
    g = np.stack(np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 9), indexing="ij"), -1).reshape(-1, 2)
    quads = [(9 * i + j, 9 * i + j + 1, 9 * i + j + 9, 9 * i + j + 10) for i in range(8) for j in range(8)]
    faces, vertices = [], []
    for axis in range(3):
        for side in (-1, 1):
            base = 81 * len(vertices)
            vertices.append(np.insert(g, axis, side, axis=1))
            faces += [[base + p, base + q, base + r] for p, q, r, _ in quads]
            faces += [[base + q, base + s, base + r] for _, q, r, s in quads]
    vertices = np.concatenate([*vertices, [[9, 9, 9]]])
    got = sp.segment_mesh(vertices, np.array(faces))
    assert same_partition(got, np.arange(len(vertices)) // 81) and got.max() == 6


def test_mesh_normals_are_running_means():
    rng = np.random.default_rng(0)
    vertices, faces = rng.random((12, 3)).astype(np.float32), np.stack([rng.permutation(12)[:3] for _ in range(30)])
    want, count = np.zeros((12, 3)), np.zeros(12)
    for face in faces:
        p, q, r = vertices[face].astype(np.float64)
        normal = np.cross(q - p, r - p)
        for v in face:
            count[v] += 1
            want[v] += (normal / np.linalg.norm(normal) - want[v]) / count[v]
    assert np.abs(sp.mesh_normals(vertices, faces) - want).max() < 1e-5


# ---- depth


def room() -> tuple[np.ndarray, np.ndarray]:
    """A wall 3 m away, grey on the left and red on the right, a box before it at 2 m, and a hole without depth."""
    depth, rgb = np.full((H, W), 3.0), np.full((H, W, 3), 128, np.uint8)
    rgb[:, 160:] = 200, 40, 40
    depth[80:160, 40:120] = 2
    depth[180:220, 240:280] = 0
    return depth, rgb


def one(labels: np.ndarray) -> int:
    """The label that all of an area have."""
    assert len(np.unique(labels)) == 1
    return int(labels.flat[0])


def test_steps_in_depth_and_colour_divide():
    """Within 8 pixels of a step normals mix both sides, so areas begin behind."""
    depth, rgb = room()
    plain, coloured = (sp.segment_depth(depth, c, K, k=0.02) for c in (None, rgb))
    assert plain.labels.shape == (60, 80) and (plain.points[..., 2] == depth[2::4, 2::4]).all()
    assert ((plain.labels == -1) == (depth[2::4, 2::4] == 0)).all()
    near, left, right = (np.s_[22:38, 12:28], np.s_[:18, :38], np.s_[:18, 42:])
    assert one(plain.labels[left]) == one(plain.labels[right]) != one(plain.labels[near])
    assert len({one(coloured.labels[area]) for area in (near, left, right)}) == 3


def test_a_crease_between_walls_divides_and_pixels_follow_their_nodes():
    """Two walls that meet in a corner of 90 degrees, seen from the room."""
    u = (np.arange(W) - K[0, 2]) / K[0, 0]
    depth = np.broadcast_to(2 / (1 + np.abs(u)), (H, W)).copy()  # z = 2 - |x|
    got = sp.depth_superpoints(depth, None, K)
    assert got.shape == (H, W) and one(got[:, :145]) != one(got[:, 175:])
    depth[112:132] = 0
    hole = sp.depth_superpoints(depth, None, K)
    assert (hole[112:132] == -1).all() and (np.delete(hole, range(112, 132), 0) >= 0).all()
    assert np.array_equal(np.unique(hole), np.arange(-1, hole.max() + 1))


def test_a_pixel_whose_node_has_no_depth_takes_the_nearest_in_space():
    depth = np.zeros((H, W))
    depth[:, :40], depth[:, 44:] = 1.0, 3.0
    depth[10, 41] = 3.0  # its node has none; in the picture the near wall is as close
    got = sp.depth_superpoints(depth, None, K)
    assert got[10, 41] == got[10, 60] != got[10, 20] and got[10, 42] == -1


def test_no_depth_is_named():
    for empty in (np.zeros((H, W)), np.full((H, W), np.nan)):
        with pytest.raises(ValueError, match="no depth"):
            sp.depth_superpoints(empty, None, K)
        with pytest.raises(ValueError, match="no depth"):
            sp.mask_superpoints(np.zeros((H, W), int), empty, np.zeros((H, W, 3), np.uint8), K)
    with pytest.raises(ValueError, match="below 2"):
        sp.segment_mesh(np.zeros((2, 3)), np.array([[0, 1, 2]]))


def test_lab_is_that_of_skimage():
    rgb = np.random.default_rng(0).random((20, 3))
    assert np.abs(sp.lab(rgb) * [100, 255, 255] - rgb2lab(rgb)).max() < 0.05


def test_real_frames(capsys):
    """Three frames: between 80 and 300 segments, fewer for larger k, all of the measured pixels in one."""
    every = sorted((SHARED / "rgbd_7scenes").glob("*.depth.png"))
    found, counts = every[:: max(len(every) // 3, 1)][:3], []
    if not found:
        pytest.skip(f"no frames in {SHARED}/rgbd_7scenes; set LAB_SHARED")
    intrinsics = np.loadtxt(SHARED / "rgbd_7scenes" / "camera-intrinsics.txt")
    for path in found:
        raw = np.asarray(Image.open(path)).astype(np.float32)
        depth = np.where(raw == 65535, 0, raw) / 1000
        rgb = np.asarray(Image.open(str(path).replace("depth.png", "color.jpg")))
        got = sp.depth_superpoints(depth, rgb, intrinsics)
        assert ((got >= 0) == (depth > 0)).all() and 80 <= got.max() + 1 <= 300
        assert sp.segment_depth(depth, rgb, intrinsics, k=0.4).labels.max() < got.max()
        counts.append(int(got.max()) + 1)
    tell(capsys, f"real frames: {len(found)} of {len(found)}, {min(counts)}..{max(counts)} superpoints")


# ---- masks


def three_masks() -> np.ndarray:
    masks = np.zeros((3, H, W), bool)
    masks[0, 5:15, 5:15], masks[1, :40, :40], masks[2, 30:50, 30:70] = True, True, True
    return masks


def test_smaller_masks_lie_on_top():
    labels = sp.paint(three_masks())
    assert labels[10, 10] == 0 and labels[0, 0] == 1 and labels[35, 35] == 2 and labels[55, 5] == -1
    assert (sp.paint(np.zeros((0, H, W), bool)) == -1).all()


def test_mask_files_agree(tmp_path):
    masks = three_masks()
    want = sp.paint(masks)
    codes = [{"segmentation": rle_encode(m), "area": int(m.sum())} for m in masks]
    (tmp_path / "a.json").write_text(json.dumps(codes))
    np.savez(tmp_path / "b.npz", masks=masks)
    Image.fromarray((want + 1).astype(np.uint8)).save(tmp_path / "c.png")
    for name in "abc":
        assert (sp.read_masks(tmp_path, name, H, W) == want).all()
    (tmp_path / "d.json").write_text("[]")
    assert (sp.read_masks(tmp_path, "d", H, W) == -1).all()
    Image.fromarray(np.full((H, W), 1000, np.uint16)).save(tmp_path / "e.png")
    assert (sp.read_masks(tmp_path, "e", H, W) == 0).all()
    np.savez(tmp_path / "c.npz", masks=masks)
    np.savez(tmp_path / "f.npz", other=masks)
    (tmp_path / "g.json").write_text('[{"segmentation": {"size": [3, 3], "counts": "9"}}]')
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "h.png")
    for name, says in (("absent", "no file"), ("c", "several files"), ("f", "masks"), ("g", "3 x 3"), ("h", "(H x W)")):
        with pytest.raises(UserError, match="expected") as e:
            sp.read_masks(tmp_path, name, H, W)
        assert says in str(e.value)
    for name in "abc"[:2]:
        with pytest.raises(UserError, match="expected"):
            sp.read_masks(tmp_path, name, H + 1, W)


def test_pixels_outside_all_masks_are_grouped_by_place_and_colour():
    depth, rgb = room()
    masks = np.full((H, W), -1)
    masks[80:160, 40:120] = 7  # the box
    got = sp.mask_superpoints(masks, depth, rgb, K, groups=6)
    assert ((got >= 0) == (depth > 0)).all() and got.max() + 1 == 7
    assert one(got[80:160, 40:120]) not in set(got[masks < 0].ravel())
    assert (got == sp.mask_superpoints(masks, depth, rgb, K, groups=6)).all()
    masks[:] = 0
    masks[0, :19] = -1
    got = sp.mask_superpoints(masks, np.ones((H, W)), rgb, K)
    assert got.max() == 1 and (got[0, :19] == 1).all()
    masks[:] = -1
    assert sp.mask_superpoints(masks, np.ones((H, W)), rgb, K, groups=1).max() == 0


# ---- oracle


def test_oracle_is_the_majority_counted_one_by_one():
    rng = np.random.default_rng(3)
    superpoints, instances = rng.integers(0, 12, 2000), rng.integers(-1, 4, 2000)
    instances[superpoints < 9] = superpoints[superpoints < 9] // 3 + 1
    instances[rng.random(2000) < 0.2] = 0
    own = np.zeros(2000, int)
    for s in range(12):
        own[superpoints == s] = np.bincount(instances[superpoints == s].clip(0)).argmax()
    got = sp.oracle(superpoints, instances)
    iou = [((own == g) & (instances == g)).sum() / ((own == g) | (instances == g)).sum() for g in (1, 2, 3)]
    assert got["iou"].tolist() == pytest.approx(iou)
    assert got["right"] == (own == instances.clip(0)).sum() and got["points"] == 2000 and got["count"] == 12


def test_oracle_of_exact_joined_and_small_instances():
    instances = np.repeat([0, 1, 2, 3], [300, 400, 200, 50])
    exact = sp.oracle(instances, instances)
    assert exact["iou"].tolist() == [1, 1]  # the third has fewer than 100 points
    joined = sp.oracle((instances > 0).astype(int), instances)
    assert joined["iou"].tolist() == pytest.approx([400 / 650, 0])
    got = sp.oracle_summary([exact, joined])
    assert got["instances"] == 4 and got["R50"] == 0.75 and got["superpoints"] == 3
    assert got["R"] == pytest.approx((9 * 2 + 3) / 36)  # 0.615 is above 0.50, 0.55, 0.60
    assert got["accuracy"] == pytest.approx((950 + 700) / 1900) and got["mIoU"] == pytest.approx((2 + 400 / 650) / 4)
    assert np.isnan(sp.oracle_summary([])["mIoU"])
