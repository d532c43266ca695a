"""Write files so that nothing is lost: beside their place, then renamed into it."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, of the same suffix, and rename it to `path` at the end; its folder is made if need be.

    A failure leaves no file, or the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_json(values: Any, indent: int | None = None) -> str:
    """Format values as JSON, which has no infinity and no NaN: these become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None), indent=indent) + "\n"


def write_json(path: Path, values: Any) -> None:
    """Write JSON."""
    with replacing(path) as part:
        part.write_text(to_json(values, indent=2))
