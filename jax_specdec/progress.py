"""What is said while something takes long: notices, what compilation takes, bars of tokens."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from jax_specdec.errors import UserError, shown_value
from jax_specdec.user_cache import cache_folder, write_whole

# Seconds before anything is said of what is running.
PATIENCE = 1.0
# The same for a program that was kept: reading it is quick, but a busy machine is slow to do it.
KEPT_PATIENCE = 60.0
# Seconds of compilation per line of StableHLO, by platform, where nothing was measured yet.
PER_LINE = {"cpu": 0.002}
MOST_RECORDS = 64

_said: set[str] = set()
_always: ContextVar[bool] = ContextVar("told_always", default=False)
_thread = threading.local()


def in_notebook() -> bool:
    """Whether output goes to the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def check_progress(progress: bool | None) -> None:
    """Raises a `UserError` for something that says neither yes nor no."""
    if progress is not None and not isinstance(progress, bool):
        raise UserError(f"progress must be True, False or None, got {shown_value(progress)}.")


def watched(progress: bool | None = None) -> bool:
    """Whether progress is shown: as told, or by default where people look, a terminal or a notebook."""
    if progress is not None:
        return progress
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


@contextlib.contextmanager
def told_always() -> Iterator[None]:
    """Within, whoever waits is told what for, wherever standard error leads: a command from a pipe has no terminal."""
    before = _always.set(True)
    try:
        yield
    finally:
        _always.reset(before)


def told(progress: bool | None = None) -> bool:
    """Whether to say what takes long: where progress is shown, and in commands."""
    return watched(progress) or (progress is None and _always.get())


def say(message: str) -> None:
    """A line for people, beside what a program prints and above a bar that is shown."""
    from tqdm import tqdm

    # A notebook shows standard error as an error.
    tqdm.write(message, file=sys.stdout if in_notebook() else sys.stderr)


def say_once(message: str, always: bool = False) -> None:
    """`say`, where people look or `always`, and not a second time in a process."""
    if (always or watched()) and message not in _said:
        _said.add(message)
        say(message)


class NoBar:
    """What nobody sees takes nothing.

    Not a disabled `tqdm`: its finaliser is Python code, where an interrupt is lost.
    """

    total = 0

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        """Closes nothing."""

    def update(self, count: int = 1) -> None:
        """Shows nothing."""

    def set_postfix(self, **_: Any) -> None:
        """Shows nothing."""


def bar(total: int, progress: bool | None = None, **options: Any) -> Any:
    """A bar of `tqdm.auto` that appears after `PATIENCE` seconds, or `NoBar` where nobody looks.

    A notebook without ipywidgets has none: it would keep a line of every state of the bar.
    """
    drawn = watched(progress) and (importlib.util.find_spec("ipywidgets") or not in_notebook())
    if not drawn:
        return NoBar()
    import_tqdm()
    from tqdm.auto import tqdm

    return tqdm(total=total, **{"delay": PATIENCE, "leave": False, **options})


def import_tqdm() -> None:
    """Imports `tqdm.auto`, whose first import in a notebook without ipywidgets warns that there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401


class Compiled(NamedTuple):
    """What the compilation of one program took on this machine.

    Attributes:
      lines: of its StableHLO. program: a digest of them.
      kept: whether JAX put it into its compilation cache.
    """

    lines: int
    seconds: float
    program: str
    kept: bool


class Compilation:
    """Compiles lowered programs, and says how long it will take where that is long.

    Nothing is said of a program that comes from JAX's compilation cache. Seconds are estimated from the
    program of the nearest size that was compiled on this machine before, `PER_LINE` without one.

    Args:
      platform: of the devices. machine: all that compilation times depend on.
      what: what is compiled, for the message.
    """

    def __init__(self, platform: str, machine: str, what: str, progress: bool | None = None):
        self._platform, self._machine, self._what = platform, machine, what
        self._shown = told(progress)
        self._file = records_file()
        self._records = read_records(self._file).get(machine, [])
        self._waiting: dict[str, tuple[int, Any]] = {}
        self._told = False

    def add(self, lowered: Any) -> str:
        """A program that will be compiled, too; returns its name here."""
        text = lowered.as_text()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._waiting[name] = (text.count("\n"), lowered)
        return name

    def compile(self, name: str) -> Any:
        """The compiled program."""
        lines, lowered = self._waiting[name]
        expected = any(record.kept and record.program == name for record in self._records)
        timer = threading.Timer(KEPT_PATIENCE if expected else PATIENCE, self._tell)
        timer.daemon = True
        hits = cache_hits()
        began = time.perf_counter()
        if self._shown and not self._told:
            timer.start()
        try:
            compiled = lowered.compile()
        finally:
            timer.cancel()
        seconds = time.perf_counter() - began
        del self._waiting[name]
        if cache_hits() == hits:
            record = Compiled(lines, round(seconds, 3), name, _kept(seconds))
            self._records = [old for old in self._records if old.program != name] + [record]
            add_record(self._file, self._machine, record)
        return compiled

    def _tell(self) -> None:
        self._told = True
        say(self.message())

    def message(self) -> str:
        """What is being compiled, and how long that will take as far as it is known."""
        guesses = [self._estimate(lines) for lines, _ in self._waiting.values()]
        known = [seconds for seconds in guesses if seconds is not None]
        if len(known) < len(guesses):
            return f"compiling ({self._what})"
        return f"compiling ({self._what}), about {rounded(sum(known))}"

    def _estimate(self, lines: int) -> float | None:
        return estimate(lines, self._records, self._platform)


def estimate(lines: int, records: list[Compiled], platform: str = "cpu") -> float | None:
    """Seconds that a program of so many lines takes: as the record of the nearest size, in proportion.

    >>> estimate(2000, [Compiled(1000, 3.0, "", False), Compiled(90_000, 500.0, "", False)])
    6.0
    """
    if not records:
        per_line = PER_LINE.get(platform)
        return None if per_line is None else lines * per_line
    nearest = min(reversed(records), key=lambda record: abs(math.log(record.lines / max(lines, 1))))
    return nearest.seconds * lines / nearest.lines


def rounded(seconds: float) -> str:
    """A duration that claims no more than it knows.

    >>> [rounded(s) for s in (0.4, 4.4, 23.0, 1000.0)]
    ['1 s', '4 s', '25 s', '17 min']
    """
    if seconds >= 180:
        return f"{seconds / 60:.0f} min"
    step = 5 if seconds >= 12.5 else 1
    return f"{max(1, round(seconds / step) * step)} s"


def machine() -> str:
    """What the times of compiled programs and of their compilation depend on, as far as JAX tells."""
    import jax

    device = jax.devices()[0]
    known = (device.device_kind, jax.__version__, os.cpu_count(), os.environ.get("XLA_FLAGS"))
    return " ".join(map(str, known))


def records_file() -> Path:
    """Where compilation times are kept: beside JAX's kept programs, or in the user's cache."""
    import jax

    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if kept and "://" not in kept:
        return Path(kept) / "jax_specdec_compilation.json"
    folder = cache_folder()
    if folder is not None:
        return folder / "compilation.json"
    return Path(tempfile.gettempdir()) / "jax_specdec_compilation.json"


def read_records(file: Path) -> dict[str, list[Compiled]]:
    """Records by machine; none where the file is missing or damaged, since they only serve to estimate."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = {
            machine: [Compiled(int(a), float(b), str(c), bool(d)) for a, b, c, d in records]
            for machine, records in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        machine: [r for r in records if r.lines > 0 and 0 <= r.seconds < math.inf]
        for machine, records in known.items()
    }


def add_record(file: Path, machine: str, record: Compiled) -> None:
    """Adds a record in place of an older one of the program; a folder that cannot be written is left alone."""
    known = read_records(file)
    others = [old for old in known.get(machine, []) if old.program != record.program]
    known[machine] = [*others, record][-MOST_RECORDS:]
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps(known))


def _kept(seconds: float) -> bool:
    import jax

    config: Any = jax.config
    on = config.jax_compilation_cache_dir and config.jax_enable_compilation_cache
    return bool(on) and seconds >= config.jax_persistent_cache_min_compile_time_secs


def cache_hits() -> int:
    """How many programs this thread has had from JAX's compilation cache, counted from the first call on."""
    with _listening:
        if not _listeners:
            import jax

            jax.monitoring.register_event_listener(_count)
            _listeners.append(_count)
    return getattr(_thread, "hits", 0)


_listening = threading.Lock()
_listeners: list[Any] = []


def _count(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.hits = getattr(_thread, "hits", 0) + 1
