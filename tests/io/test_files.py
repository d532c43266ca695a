"""Files are written whole or not at all, and JSON is JSON."""

import json
import math
from pathlib import Path

import pytest

from mrjax.io.files import write_json


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"a": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}


def test_values_that_json_cannot_say_are_null(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    write_json(tmp_path / "a.json", {"psnr": math.inf, "std": [math.nan, -math.inf], "ssim": 1.0})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"psnr": None, "std": [None, None], "ssim": 1.0}
