"""The lab's folder in the user's cache, and files in it that are made from others."""

import os
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/gdsdirect-lab; made when it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "gdsdirect-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def derived(name: str, sources: Sequence[Path], make: Callable[[], bytes]) -> Path:
    """The file `name` in the cache, with what `make` returns; made anew when `sources` change.

    Several processes may ask for it at once: none sees it half-written.
    """
    stamp = repr([(str(source.resolve()), source.stat().st_mtime_ns) for source in sources])
    path = folder() / f"{name}-{sha256(stamp.encode()).hexdigest()[:16]}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as work:
            (Path(work) / name).write_bytes(make())
            (Path(work) / name).rename(path)
    return path
