"""A report is whole in one file: metrics are those of evaluate, images are true to a grey level, names are text."""

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import rss, to_kspace, write_scan, write_volume
from PIL import Image

from mrjax.io import readers
from mrjax.io.volume import Volume
from mrjax.measures import evaluator
from mrjax.report import figures, html, selection

HOSTILE = "<script>alert(1)<b> $x_{1}$ \"&amp;' \udcff"


def images_of(volume: Volume, noise: float) -> dict[str, np.ndarray]:
    """Corrupted, reconstruction and target of a volume, with more noise in earlier slices."""
    target = readers.read_slices(volume.path, "reconstruction_rss", volume.slices)
    grain = np.random.default_rng(0).normal(size=target.shape) * np.linspace(1, 0.5, len(target))[:, None, None]
    noisy = {"corrupted": np.abs(target + 2 * noise * grain), "reconstruction": np.abs(target + noise * grain)}
    return {name: image.astype(np.float32) for name, image in noisy.items()} | {"target": target}


def add_volumes(report: html.Report, folder: Path, count: int, slices: int = 5, hostile: bool = True) -> list[dict]:
    """Add volumes, each noisier than the last, the first of a hostile name, and return their rows as in evaluate."""
    rows = []
    for number in range(count):
        volume = readers.describe(str(write_scan(folder / f"{number}_T101.t5", slices, seed=number)))
        images = images_of(volume, 0.02 * (number + 1))
        if hostile and not number:
            volume = dataclasses.replace(volume, path=f"{volume.path}/{HOSTILE}.t5", contrast="</script><i>$\\frac{")
        scores = evaluator.score_volume(images, volume)
        rows.append(evaluator.describe(volume) | scores)
        report.add(volume, images, scores)
    return rows


def write(report: html.Report, path: Path, curves: list[dict] | None = None) -> str:
    facts, config = {"data": f"a folder {HOSTILE}"}, {"data.dir": (HOSTILE, ""), "steps": (6, 6)}
    report.write(path, f"U-Net {HOSTILE}", ("zero-filled", "U-Net"), facts, config, curves or [])
    return path.read_text()


class Page(HTMLParser):
    """What is in a page: tags with their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.scripts, self.open = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self.open[-1:]:
            self.scripts[-1] += data
        elif "style" not in self.open[-1:]:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Page, list[dict]]:
    folder, report = tmp_path_factory.mktemp("report"), html.Report(3)
    rows = add_volumes(report, folder, 3)
    curves = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "val/psnr": 30.0, "val/ssim": 0.9}]
    return Page(write(report, folder / "report.html", curves)), rows


def test_a_page_needs_no_other_file_and_its_parts_refer_to_one_another(page) -> None:
    tags, ids = [tag for tag, _ in page[0].tags], page[0].values("id")
    assert tags.count("script") == 2
    assert not {"link", "iframe", "object", "img", "base"} & {tag for tag, a in page[0].tags if a.get("rel") != "icon"}
    assert page[0].values("src") == []
    assert {href[:1] for href in page[0].values("href")} == {"#", "d"}  # places in the page, and the data of the icon
    assert len(ids) == len(set(ids))
    targets = [href[1:] for href in page[0].values("href") if href.startswith("#")]
    targets += [name for key in ("aria-labelledby", "aria-describedby") for name in page[0].values(key)]
    assert set(targets) <= set(ids)
    for section in ("metrics", "viewer", "slices", "volumes", "training", "details"):
        assert section in targets, f"the navigation leads to {section}"


def test_names_are_text_wherever_they_stand(page) -> None:
    parsed, shown = page[0], HOSTILE.replace("\udcff", "\\udcff")
    assert not {"b", "i"} & {tag for tag, _ in parsed.tags}
    assert parsed.text.count(shown) >= 6  # title, heading, data, config, table, worst slices
    assert "</script><i>$\\frac{" in parsed.text
    assert parsed.data["volumes"][0]["name"] == shown
    assert "alert" not in parsed.scripts[1]


def test_metrics_are_those_of_evaluate(page) -> None:
    parsed, rows = page
    assert "2\N{NO-BREAK SPACE}volumes" in parsed.text  # of T1
    for name, scores in evaluator.summarise(rows)["all"]["reconstruction"].items():
        assert html.METRICS[name].format(scores["mean"]) in parsed.text
        values = [row[method][name] for row in rows for method in evaluator.METHODS]
        assert set(map(str, values)) <= set(parsed.values("data-value"))


def test_images_are_true_to_a_grey_level_and_tell_what_is_no_number() -> None:
    image = np.random.default_rng(0).random((40, 30)) ** 3 * 1e-4
    image[3, 4], image[5, 6], image[7, 8] = np.nan, np.inf, -1e-5
    codes = decode(selection.encode(image, 1e-4))
    assert codes[3, 4] == codes[5, 6] == selection.NOT_FINITE
    assert (codes == selection.NOT_FINITE).sum() == 2
    values = selection.HEADROOM * 1e-4 * (codes / 254.0) ** 2
    step = 1e-4 * selection.HEADROOM / 254 * (1 + codes / 127)  # a level, in the middle of which the value lies
    finite = np.isfinite(image)
    assert (np.abs(values - np.maximum(image, 0)) <= step)[finite].all()
    assert decode(selection.encode(np.ones((1100, 700)), 1.0)).shape == (366, 233)  # not larger than it is shown


def decode(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_the_error_is_that_of_the_reconstruction_on_its_stated_scale(page, tmp_path) -> None:
    volume = page[0].data["volumes"][1]
    path = write_scan(tmp_path / "1_T101.t5", 5, seed=1)
    images = images_of(readers.describe(str(path)), 0.04)
    white, error = figures.white_level(images), np.abs(images["reconstruction"] - images["target"])
    assert volume["white"] == f"{white:.3g}"
    for number, of in enumerate(volume["slices"]):
        values = 2 * white / volume["gain"] * (decode(of["images"]["error"]) / 254.0) ** 2
        assert np.abs(values - np.minimum(error[number], 2 * white / volume["gain"])).max() < 0.01 * white


def test_what_does_not_fit_is_left_out_and_said_but_for_the_worst_and_the_best(tmp_path, monkeypatch) -> None:
    everything = html.Report(6)
    add_volumes(everything, tmp_path, 6, hostile=False)
    monkeypatch.setattr(html, "PAGE_BYTES", html.MAX_BYTES - 60_000)
    report = html.Report(6)
    add_volumes(report, tmp_path, 6, hostile=False)
    parsed = Page(write(report, tmp_path / "report.html"))
    names = [
        [(shown.row["volume"], number) for part in one._selection.extremes() for shown, number in part]
        for one in (everything, report)
    ]
    assert len(names[0]) == 8
    assert names[0] == names[1]
    shown = sum(len(volume["slices"]) for volume in parsed.data["volumes"])
    assert 8 <= shown < 30
    assert f"{shown} of 30 slices" in parsed.text
    assert sum(len(i) for v in parsed.data["volumes"] for s in v["slices"] for i in s["images"].values()) < 51_000
    assert parsed.text.count("_T101") >= 6  # every volume is in the table


def test_a_long_volume_is_thinned_out_evenly(tmp_path) -> None:
    volume = readers.describe(str(write_scan(tmp_path / "a.t5", 24)))
    chosen = selection.Selection(1, 60_000)
    chosen.add(evaluator.describe(volume), volume, images_of(volume, 0.1))
    (shown,) = chosen.shown
    numbers = sorted(shown.slices)
    assert numbers[0] == 0
    assert 4 < len(numbers) < 24


def test_files_without_a_target_have_images_and_no_metrics(tmp_path) -> None:
    kspace = to_kspace(np.random.default_rng(0).random((3, 2, 32, 32)))
    kspace[..., 1::2] = 0
    path = str(write_volume(tmp_path / "a.t5", {"kspace": kspace, "mask": np.arange(32) % 2 == 0}))
    volume = dataclasses.replace(readers.describe(path), simulated=True)
    report, image = html.Report(1), rss(kspace)
    report.add(volume, {"corrupted": image, "reconstruction": image}, {})
    parsed = Page(write(report, tmp_path / "report.html"))
    assert "no metrics" in parsed.text
    assert "simulated, measured undersampled, 1.9x" in parsed.text
    assert [list(of["images"]) for of in parsed.data["volumes"][0]["slices"]] == [["corrupted", "reconstruction"]] * 3
    assert not {"metrics", "slices", "training"} & set(parsed.values("id"))


def test_a_slice_that_is_no_number_is_the_worst(tmp_path) -> None:
    volume = readers.describe(str(write_scan(tmp_path / "a.t5", 10)))
    images = images_of(volume, 0.1)
    images["reconstruction"][6, 16, 16] = np.nan
    chosen = selection.Selection(1, 10**6)
    chosen.add(evaluator.describe(volume) | evaluator.score_volume(images, volume), volume, images)
    worst, best = chosen.extremes()
    assert worst[0][1] == 6
    assert len(worst) == len(best) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_constant_and_broken_volumes_are_reported(tmp_path, value) -> None:
    volume = readers.describe(str(write_scan(tmp_path / "a.t5", 2)))
    images = dict.fromkeys(("corrupted", "reconstruction", "target"), np.full((2, 32, 32), value, np.float32))
    report = html.Report(1)
    report.add(volume, images, evaluator.score_volume(images, volume))
    parsed = Page(write(report, tmp_path / "report.html"))
    assert len(parsed.data["volumes"][0]["slices"]) == 2


def test_a_report_is_known_from_other_pages(tmp_path) -> None:
    report = html.Report(1)
    add_volumes(report, tmp_path, 1)
    write(report, tmp_path / "report.html")
    (tmp_path / "other.html").write_text("<!doctype html><title>mrjax</title>")
    assert html.is_report(tmp_path / "report.html")
    assert not html.is_report(tmp_path / "other.html")
