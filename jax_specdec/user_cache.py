"""Files that are kept for the user between runs: what was measured, and compiled programs."""

import os
import threading
from pathlib import Path


def cache_folder() -> Path | None:
    """This library's part of the user's cache, which need not exist; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jax_specdec"
    except RuntimeError:
        return None


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that nobody ever reads a part of it, with the folders above it.

    Raises:
      OSError: it cannot be written; what was there is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
