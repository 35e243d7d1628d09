"""Files that are kept for the user between runs: what was measured, and compiled programs."""

import hashlib
import importlib.util
import os
import platform
import tempfile
import threading
from pathlib import Path
from typing import Any

# Of compiled programs, behind which those that were not used for longest go.
MOST_BYTES = 4 << 30


def cache_folder() -> Path | None:
    """This library's part of the user's cache, which need not exist; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    if not given and os.environ.get("HOME") == "":
        return None
    try:
        return Path(given or "~/.cache").expanduser() / "jax_specdec"
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


def programs_folder() -> Path | None:
    """Where compiled programs are kept by default: apart for each kind of processor, whose code they are."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = [platform.processor()]
    features = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    )
    digest = hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()
    return folder / "programs" / digest[:16]


def keep_programs() -> str | None:
    """Has JAX keep compiled programs in the user's cache, unless it was told where, or not to.

    Returns:
      Why that cannot be, or None.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    folder = programs_folder()
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache or not folder:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"programs")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return f"programs are compiled by each run: {folder} cannot be written ({reason})"
    if config.jax_compilation_cache_max_size == -1 and importlib.util.find_spec("filelock"):
        config.update("jax_compilation_cache_max_size", MOST_BYTES)
    config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # what was compiled before had none
    return None
