"""Figures appear complete, show every pixel undistorted on the scale they state, and survive odd input."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from mrjax.report import figures


def picture(path):
    """Read a PNG as (height, width, 3) floats, and expect no other file beside it."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes().startswith(b"\x89PNG")
    return imread(path)[..., :3]


def contains(shown, image):
    """Whether the colours of `image`, magnified by a whole number, stand somewhere in the picture."""
    zoom = -(-figures.SHORT_SIDE // min(image.shape[:2]))
    image = image.repeat(zoom, 0).repeat(zoom, 1)
    height, width = image.shape[:2]
    places = np.ones((shown.shape[0] - height + 1, shown.shape[1] - width + 1), bool)
    for row, column in ((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)):
        window = shown[row : row + places.shape[0], column : column + places.shape[1]]
        places &= (np.abs(window - image[row, column]) < 0.03).all(-1)
    return any(
        np.allclose(shown[top : top + height, left : left + width], image, atol=0.03)
        for top, left in np.argwhere(places)
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (80, 40), (31, 57)])
def test_pixels_are_square_blocks_of_the_stated_scales(tmp_path, height, width):
    rng = np.random.default_rng(0)
    target = 1e-6 * rng.random((height, width)).astype(np.float32)
    reconstruction = target * 0.96
    corrupted = 1e-6 * rng.random((height, width)).astype(np.float32)
    images = {"corrupted": corrupted, "reconstruction": reconstruction, "target": target}
    figures.draw_panel(tmp_path / "a.png", images, "", {})
    shown, white = picture(tmp_path / "a.png"), np.percentile(target, 99.5)
    for image in images.values():
        assert contains(shown, colormaps["gray"](image / white)[..., :3])
    # An error of 4 % is shown on a scale 20 times as steep.
    assert contains(shown, colormaps["inferno"](20 * (target - reconstruction) / white)[..., :3])


def test_size_follows_the_image_and_the_columns(tmp_path):
    image, sizes = np.random.default_rng(0).random((64, 32)), {}
    for names in (("corrupted", "reconstruction"), ("corrupted", "reconstruction", "target")):
        path = tmp_path / str(len(names)) / "a.png"
        path.parent.mkdir()
        figures.draw_panel(path, dict.fromkeys(names, image), "volume", {})
        sizes[len(names)] = picture(path).shape
    assert 2 * 448 < sizes[2][1] < 2 * 448 + 100
    assert 4 * 448 < sizes[3][1] < 4 * 448 + 250
    assert 896 < sizes[2][0] == sizes[3][0] < 896 + 250


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_constant_and_broken_images_are_drawn(tmp_path, value):
    image = np.full((16, 16), value)
    metrics = {"reconstruction": {"psnr": np.inf, "ssim": np.nan, "nmse": 0.0}}
    images = dict.fromkeys(("corrupted", "reconstruction", "target"), image)
    figures.draw_panel(tmp_path / "a.png", images, "", metrics)
    shown = picture(tmp_path / "a.png")
    colour = {1.0: (1, 1, 1)}.get(value, (1, 0, 1) if not np.isfinite(value) else (0, 0, 0))
    assert contains(shown, np.full((16, 16, 3), colour, np.float32))


def test_a_figure_that_fails_leaves_the_old_one_and_no_rubbish(tmp_path, monkeypatch):
    figures.draw_curves(tmp_path / "a.png", [{"step": 1, "loss": 0.5}])
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.draw_curves(tmp_path / "a.png", [{"step": 2, "loss": 0.4}])
    picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before


def test_text_with_dollar_signs_is_drawn_as_it_is(tmp_path):
    images = dict.fromkeys(("corrupted", "reconstruction"), np.ones((16, 16)))
    figures.draw_panel(tmp_path / "cost_$5_$.png", images, r"cost_$5_{$ \frac", {})
    assert picture(tmp_path / "cost_$5_$.png").max() == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "loss": 1.0}, {"step": 10, "loss": float("nan")}, {"step": 20, "loss": 0.0}],
        [{"step": 5, "val/psnr": 30.0, "val/ssim": 0.9, "val/nmse": 0.01}, {"step": 6, "val/psnr": float("inf")}],
    ],
)
def test_curves_of_a_run_that_just_began_or_broke(tmp_path, rows):
    figures.draw_curves(tmp_path / "a.png", rows)
    height, width, _ = picture(tmp_path / "a.png").shape
    assert (height, width) == (352, 1210)


def test_every_logged_curve_is_drawn(tmp_path):
    row, drawn = {}, []
    for key in ("step", "loss", "val/psnr", "val/ssim"):
        row[key] = 0.5
        figures.draw_curves(tmp_path / "a.png", [row | {"step": step} for step in range(5)])
        blue = np.abs(picture(tmp_path / "a.png") - (0x2F / 255, 0x6D / 255, 0xB3 / 255)) < 0.02
        drawn.append(blue.all(-1).sum())
    assert drawn[0] == 0
    assert (np.diff(drawn) > 100).all()


@pytest.mark.parametrize("title", ["$\\frac{1}{0}$", "\x1b[2J\n\udcff\0", "<b>_^{}"])
def test_a_title_is_text_whatever_it_holds(tmp_path, title):
    figures.draw_panel(tmp_path / "a.png", {"reconstruction": np.ones((8, 8))}, title, {})
    assert picture(tmp_path / "a.png").any()
