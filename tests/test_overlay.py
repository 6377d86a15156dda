"""utils/overlay.py: what is drawn is where it should be, inputs stay untouched, any picture size works."""

import os

import numpy as np
import pytest
from PIL import Image

from utils import overlay

SIZES = [(40, 56), (90, 160), (361, 203), (720, 1280)]  # (H, W) px


def grey(size=(90, 160)) -> np.ndarray:
    return np.full((*size, 3), 110, np.uint8)


def changed(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int, int]:
    """Box (x0, y0, x1, y1) px, ends included, of the pixels that differ."""
    y, x = np.nonzero((a != b).any(2))
    return x.min(), y.min(), x.max(), y.max()


@pytest.mark.parametrize("size", SIZES)
def test_all_keep_input_type_and_size(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image.setflags(write=False)
    H, W = size
    region = np.zeros(size, bool)
    region[H // 4 : H // 2, W // 4 : W // 2] = True
    same_size = [
        overlay.text(image, (2, 2), "frame 7"),
        overlay.text(image, (0, 0), ""),
        overlay.box(image, (-5, -5, W + 9, H / 2), label="player"),
        overlay.box(image, (W / 2, H / 2, 3, 3)),
        overlay.mask(image, region),
        overlay.mask(image, ~region & region),
        overlay.trail(image, [(0, 0), None, (W + 50, -20), (W / 2, H / 2), (W / 3, H / 2)]),
        overlay.trail(image, []),
        overlay.trail(image, [None, None]),
        overlay.flash(image),
    ]
    assert all(out.shape == image.shape and out.dtype == np.uint8 for out in same_size)
    taller = [
        overlay.caption_bar(image, "a long caption that needs more than one line on a small picture"),
        overlay.caption_bar(image, ""),
        overlay.score_strip(image, np.linspace(-1, 2, 50), 10, [10, (20, "hit")]),
        overlay.score_strip(image, [0.5], 0, window=30),
        overlay.score_strip(image, [np.nan] * 5, 2),
    ]
    for out in taller:
        assert out.shape[0] > H and out.shape[1:] == (W, 3) and out.dtype == np.uint8
        assert np.array_equal(out[:H], image)


def test_text_is_readable_on_any_ground_and_stays_inside():
    for ground in (0, 110, 255):
        image = np.full((90, 160, 3), ground, np.uint8)
        out = overlay.text(image, (10, 10), "HIT")
        assert out.min() == 0 and out.max() == 255  # white letters, black outline
    x0, y0, x1, y1 = changed(grey(), overlay.text(grey(), (10, 20), "HIT"))
    assert 7 <= x0 <= 13 and 17 <= y0 <= 26
    for anchor in ("la", "rs", "mm"):
        inside = overlay.text(grey(), (60, 40), "HIT", anchor=anchor)
        for far in ((500, -40), (-70, 300)):  # outside: pushed back in, whole
            moved = overlay.text(grey(), far, "HIT", anchor=anchor)
            assert (moved != grey()).sum() == pytest.approx((inside != grey()).sum(), rel=0.1)
    _, top, _, bottom = changed(grey((1080, 1920)), overlay.text(grey((1080, 1920)), (9, 9), "HIT"))
    assert bottom - top > 2 * (y1 - y0)  # grows with the picture


def test_box_lies_on_its_coordinates():
    image = grey((360, 640))
    out = overlay.box(image, (100, 50, 200, 150), colour=(255, 0, 0), width=2)
    assert changed(image, out) == (99, 49, 201, 151)
    assert (out[50, 100:201] == (255, 0, 0)).all() and (out[50:151, 200] == (255, 0, 0)).all()
    assert (out[54:147, 104:197] == 110).all()
    labelled = overlay.box(image, (100, 50, 200, 150), label="ball")
    assert changed(image, labelled)[1] < 45


def test_mask_tints_only_inside():
    image, region = grey(), np.zeros((90, 160), bool)
    region[20:60, 30:100] = True
    out = overlay.mask(image, region, colour=(0, 255, 0), alpha=0.5)
    assert (out[~region] == 110).all()
    assert (out[20, 30:100] == (0, 255, 0)).all() and (out[20:60, 99] == (0, 255, 0)).all()  # the outline
    assert np.abs(out[40, 60].astype(int) - (55, 182, 55)).max() <= 1
    assert np.abs(overlay.mask(image, region, outline=False)[20, 30].astype(int) - 110).max() > 10
    with pytest.raises(ValueError, match="bool"):
        overlay.mask(image, region.astype(np.uint8))


def test_trail_fades_breaks_and_ends_in_a_ring():
    image = grey((360, 640))
    points = [(40 + 20 * k, 180) for k in range(20)]
    points[10] = None
    out = overlay.trail(image, points, colour=(255, 255, 0), radius=6)
    strength = np.abs(out[180].astype(int) - 110).sum(1)  # (W,) along the path
    assert 0 < strength[60] < strength[180] < strength[340]
    assert not strength[230:250].any()  # around the missing point at x = 240
    assert strength[420 - 6] and strength[420 + 6] and not strength[420 + 12 :].any()
    assert np.abs(out[180 - 5, 420].astype(int) - (255, 255, 0)).max() < 60


def test_flash_is_at_the_border_and_scales():
    image = grey()
    full, half = overlay.flash(image, (255, 0, 0)), overlay.flash(image, (255, 0, 0), 0.5)
    assert (full[0] == (255, 0, 0)).all() and (full[:, -1] == (255, 0, 0)).all()
    assert np.array_equal(full[20:70, 20:140], image[20:70, 20:140])
    assert np.array_equal(overlay.flash(image, strength=0.0), image)
    assert 110 < half[0, 80, 0] < 255


def test_caption_wraps():
    one = overlay.caption_bar(grey(), "short")
    three = overlay.caption_bar(grey(), "the player at the near end of the court hits a backhand down the line")
    assert three.shape[0] > one.shape[0] > 90
    assert three[90:].max() > 200


def test_score_strip_shows_scores_position_and_events():
    image, curve = grey((180, 400)), np.zeros(200)
    curve[50] = 1.0
    plain = overlay.score_strip(image, curve, 150)[180:]
    there = overlay.score_strip(image, curve, 50)[180:]
    red = np.array(overlay.PALETTE[2])

    def red_column(strip):
        return int(np.abs(strip[-4].astype(int) - red).sum(1).argmin())

    assert red_column(plain) == pytest.approx(150 / 199 * 399, abs=2)
    assert red_column(there) == pytest.approx(50 / 199 * 399, abs=2)
    for position in (20, 120):
        moving = overlay.score_strip(image, curve, position, window=64)[180:]
        assert red_column(moving) == pytest.approx(199.5, abs=2)  # always in the middle
    peak = np.abs(plain[12:].astype(int) - overlay.score_strip(image, np.zeros(200), 150)[192:]).sum((0, 2))  # (W,)
    assert peak.argmax() == pytest.approx(50 / 199 * 399, abs=3)
    marked = overlay.score_strip(image, curve, 150, [(100, "hit"), 20])[180:]
    x = np.nonzero((marked[-8] != plain[-8]).any(1))[0]
    assert set(np.round(x / 399 * 199 / 2).astype(int)) <= {9, 10, 11, 49, 50, 51} and len(x) >= 2


def test_grid_places_every_picture(tmp_path):
    images = [np.full((30, 40 + 10 * (k == 2), 3), 40 * k + 20, np.uint8) for k in range(5)]
    sheet = overlay.grid(images, 3, pad=4)
    assert sheet.shape == (2 * 34 + 4, 3 * 54 + 4, 3)
    for k, image in enumerate(images):
        assert (sheet == image[0, 0]).all(2).sum() == image.shape[0] * image.shape[1], k
    assert (sheet[34:38] == overlay.DARK).all() and (sheet[:, :4] == overlay.DARK).all()
    assert overlay.grid(images[:2], 9).shape[1] == 2 * 44 + 4
    named = overlay.grid(images, 3, [str(k) for k in range(5)])
    assert named.shape[0] > sheet.shape[0]
    with pytest.raises(ValueError, match="captions"):
        overlay.grid(images, 3, ["a"])
    with pytest.raises(ValueError, match="0 images"):
        overlay.grid([], 3)
    overlay.save_png(tmp_path / "sheet.png", sheet)
    assert np.array_equal(np.array(Image.open(tmp_path / "sheet.png")), sheet)
    assert os.listdir(tmp_path) == ["sheet.png"]
    with pytest.raises(ValueError, match="expected"):
        overlay.save_png(tmp_path / "bad.png", sheet.astype(np.float32))
    with pytest.raises(OSError):
        overlay.save_png(tmp_path / "none" / "a.png", sheet)
