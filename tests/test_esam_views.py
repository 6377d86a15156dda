"""Views and labels of clips: what the network sees agrees with what was recorded, and labels number objects alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.esam_views import asking, clip_labels, clip_views, points_view
from data.rgbd_clips import RoomClips
from data.rgbd_frames import Augmentation, project
from data.rooms import CLASSES
from utils.run import UserError


def clip(**settings):
    return RoomClips(3, 0, clip_len=3, points=600, exact=True, size=(48, 64), **settings)[(1, 0)]


def test_views_hold_augmented_points_and_recorded_cameras():
    item = clip(augment=Augmentation())
    for t, view in enumerate(clip_views(item, pictures=True)):
        assert torch.equal(view.coords, torch.from_numpy(item.coords[t]))
        assert not np.allclose(view.coords, item.frames[t].xyz)
        world = view.camera.double() @ view.pose[:3, :3].double().T + view.pose[:3, 3].double()
        np.testing.assert_allclose(world, item.frames[t].xyz, atol=1e-5)
        uv, _ = project(item.frames[t].xyz, item.frames[t].intrinsics, item.frames[t].pose)
        np.testing.assert_allclose(view.uv, uv, atol=1e-2)
        u, v = view.uv.long().T
        colour = view.picture[:, v, u].T / 255
        torch.testing.assert_close(colour.float(), view.colour, atol=1e-6, rtol=0)
        assert view.size == (48, 64) and view.queries is None


def test_labels_number_the_objects_of_all_frames_alike():
    item = clip()
    labels = clip_labels(item, len(CLASSES))
    views = clip_views(item)
    G = len(labels[0].classes)
    assert G > 1 and all(torch.equal(x.classes, labels[0].classes) for x in labels) and (labels[0].classes >= 2).all()
    for view, own in zip(views, labels, strict=True):
        assert own.boxes.shape == (G, 6) and int(own.instance.max()) < G and int(own.instance.min()) == -1
        thing = own.instance >= 0
        assert torch.equal(own.semantic[thing], own.classes[own.instance[thing]])
        low, high = own.boxes[own.instance[thing]].split(3, 1)
        assert (view.coords[thing] > low - 0.02).all() and (view.coords[thing] < high + 0.02).all()


def test_queries_are_half_to_all_of_the_superpoints():
    superpoint, rng = np.arange(40).repeat(3), np.random.default_rng(0)
    drawn = [asking(superpoint, rng) for _ in range(50)]
    assert all(20 <= len(q) <= 40 and (np.diff(q) > 0).all() and q[-1] < 40 for q in drawn)
    assert len({len(q) for q in drawn}) > 5
    again = clip_views(clip(), np.random.default_rng(3))[0].queries
    assert torch.equal(again, clip_views(clip(), np.random.default_rng(3))[0].queries)


def test_pictures_are_rendered_ones_or_files_or_asked_for(tmp_path):
    item = clip()
    files = []
    for k, picture in enumerate(item.pictures):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(picture).save(files[-1])
    rendered, read = clip_views(item, pictures=True), clip_views(replace(item, pictures=None, images=files), None, True)
    assert all(torch.equal(a.picture, b.picture) for a, b in zip(rendered, read, strict=True))
    files[1].write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        clip_views(replace(item, pictures=None, images=files), None, True)
    with pytest.raises(UserError, match="pass --raw"):
        clip_views(replace(item, pictures=None), None, True)
    assert clip_views(replace(item, pictures=None))[0].picture is None


def test_points_without_superpoints_or_labels_are_refused():
    item = clip()
    with pytest.raises(ValueError, match="have no superpoints"):
        points_view(replace(item.frames[0], superpoint=None))
    with pytest.raises(ValueError, match="has no labels"):
        clip_labels(replace(item, frames=[replace(f, semantic=None) for f in item.frames]), len(CLASSES))
