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


def write_json(path: Path, values: Any) -> None:
    """Write JSON."""
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")
