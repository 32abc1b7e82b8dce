"""Pictures show the right places."""

import sys

import numpy as np
import pytest
from PIL import Image

from catp_jax.study.pictures import DIMMED, Panel, dim, draw_kept, is_mask

IMAGE = np.linspace(0.2, 1, 6 * 12 * 3).reshape(6, 12, 3)


def test_dropped_patches_are_dimmed_and_kept_ones_are_not():
    mask = np.zeros((2, 4), bool)
    mask[0, 1] = mask[1, 3] = True
    shown = dim(IMAGE, mask)
    np.testing.assert_array_equal(shown[:3, 3:6], IMAGE[:3, 3:6])
    np.testing.assert_array_equal(shown[3:, 9:], IMAGE[3:, 9:])
    rest = np.ones((6, 12), bool)
    rest[:3, 3:6] = rest[3:, 9:] = False
    np.testing.assert_allclose(shown[rest], DIMMED * IMAGE[rest])


def test_patches_need_not_divide_the_image():
    shown = dim(np.ones((5, 5, 3)), np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert (shown == 1).sum() == 3 * 3 * 3


@pytest.mark.parametrize(
    ("kept", "expected"),
    [([[True, False]], True), ([[1.0, 0.0]], True), ([[0.5, 0.0]], False), ([[0, 0]], True)],
)
def test_a_mask_holds_nothing_but_yes_and_no(kept, expected):
    assert is_mask(np.array(kept)) == expected


def test_a_figure_shows_images_masks_and_heat_maps(tmp_path):
    heat = np.zeros((2, 4))
    heat[1, 3] = 0.5
    panels = [
        [Panel(IMAGE, None, "all"), Panel(IMAGE, heat > 0, "a mask"), Panel(IMAGE, heat, "a map")],
        [Panel(IMAGE, None, "a question of very many words, which is cut\nan answer")],
    ]
    draw_kept(panels, tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    colours = pixels.max(axis=2) - pixels.min(axis=2)
    third = pixels.shape[1] // 3
    assert colours[:, : 2 * third].max() < 30  # the image is nearly grey, the heat map is not
    assert colours[:, 2 * third :].max() > 80


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        draw_kept([[Panel(IMAGE, None, "")]], tmp_path / "kept.png")
