"""What a machine has for decoding, and what would go wrong there: the findings of `jax-specdec doctor`."""

import dataclasses
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from jax_specdec.errors import UserError
from jax_specdec.user_cache import programs_folder

PROBE = "import jax; d = jax.devices(); print(len(d), d[0].platform, d[0].device_kind, sep='\\n')"
PROBE_S = 120  # a TPU that another process holds, or a driver that hangs
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")
FULL, NEARLY_FULL = 50 << 20, 2 << 30  # free bytes of a disk
LITTLE_MEMORY = 1 << 30
NAMES = {"gpu": "cuda", "tpu": "tpu"}  # in JAX_PLATFORMS
INSTALL = {"gpu": 'pip install "jax-specdec[cuda]"', "tpu": 'pip install "jax-specdec[tpu]"'}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
      part: what it is about. remedy: what to do, where something is to be done.
    """

    part: str
    state: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""


Findings = Iterator[Finding]


def examine(source: str | None, describe: Callable[[], dict[str, Any]]) -> Findings:
    """Everything about this machine, in the order of what depends on what.

    Args:
      source: the model, a folder or hub id, None for the demo's.
      describe: what `jax-specdec info` says of it, with `drafters`, what is wrong with each that it has, and
        `reason`, why `auto` takes its drafter.
    """
    yield from guarded("versions", versions)
    found = probe()
    if isinstance(found, Finding):
        yield found
    else:
        yield from guarded("device", lambda: device(*found))
    yield from guarded("programs", compile_cache)
    yield from guarded("hub", hub_cache)
    shown = list(guarded("demo", demo))
    yield from shown
    yield from guarded("drafters", kinds)
    if isinstance(found, Finding):
        return
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # the device's line says it
    yield from guarded("memory", memory)
    about: dict[str, Any] = {}
    if source is not None or shown[0].state == "ok":
        yield from guarded("model", lambda: model(source, describe, about))
    if source is None or about:  # those of a model that is not there are not known
        yield from guarded("kernels", lambda: kernels(about))


def guarded(part: str, look: Callable[[], Findings]) -> Findings:
    """The findings of one look; whatever goes wrong in it is one more."""
    try:
        yield from look()
    except UserError as error:
        yield Finding(part, "fail", str(error))
    except Exception as error:  # of any library beneath: a diagnosis goes on
        first = (str(error).strip().splitlines() or [""])[0]
        yield Finding(part, "fail", f"{type(error).__name__}: {first[:300]}")


def versions() -> Findings:
    """Python, and every dependency against the range that is declared for it."""
    from packaging.requirements import Requirement

    try:
        version = importlib.metadata.version("jax-specdec")
        declared = [Requirement(line) for line in importlib.metadata.requires("jax-specdec") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "warn", "jax_specdec is not installed", "pip install -e .")
        return
    good = [f"Python {sys.version.split()[0]}", f"jax_specdec {version}"]
    bad = []
    for item in declared:
        if item.marker is not None and not item.marker.evaluate({"extra": ""}):
            continue
        remedy = f'pip install "{item.name}{item.specifier}"'
        try:
            have = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(Finding("versions", "fail", f"{item.name} is not installed", remedy))
            continue
        if item.specifier.contains(have, prereleases=True):
            if item.name in ("jax", "transformers"):
                good.append(f"{item.name} {have}")
        else:
            text = f"{item.name} {have} is outside of what is tested, {item.specifier}"
            bad.append(Finding("versions", "warn", text, remedy))
    yield Finding("versions", "ok", ", ".join(good))
    yield from bad


def probe() -> tuple[int, str, str] | Finding:
    """How many devices JAX has, their platform and kind, or why it has none.

    A process of its own is asked: a wrong flag or driver can end it, or make it wait for ever.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        text = f"JAX does not answer within {PROBE_S} s"
        return Finding("device", "fail", text, "does another process hold the device?")
    if done.returncode == 0:
        count, platform, kind = done.stdout.splitlines()[-3:]
        return int(count), platform, kind
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # What ends the process, such as an unknown flag, is said before the stack of C++.
    fatal = [line.partition("] ")[2] for line in lines if line.startswith("F") and "] " in line]
    last = (fatal or lines or [""])[0 if fatal else -1]
    reason = f": {last[:300]}" if " " in last else ""
    if "XLA_FLAGS" in last:
        return Finding("device", "fail", f"JAX does not start{reason}", "correct XLA_FLAGS")
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted:
        return Finding("device", "fail", f"JAX finds no device{reason}")
    text = f"JAX finds no device for JAX_PLATFORMS={wanted[:40]}{reason}"
    installs = [f" or {INSTALL[kind]}" for kind, name in NAMES.items() if name in wanted]
    return Finding("device", "fail", text, f"unset JAX_PLATFORMS{''.join(installs)}")


def device(count: int, platform: str, kind: str) -> Findings:
    """The devices, and accelerators that are there and not used."""
    several = f"{count} x " if count > 1 else ""
    if platform != "cpu":
        yield Finding("device", "ok", f"{several}{kind} ({platform})")
        return
    chosen = os.environ.get("JAX_PLATFORMS", "")
    have = "gpu" if _exists("/dev/nvidia[0-9]*") else "tpu" if _exists("/dev/accel*") else ""
    names = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}
    plugins = [name for name in PLUGINS if _installed(name)]
    text, remedy = f"{several}CPU alone", ""
    if chosen and have:
        text, remedy = f"{text}: there is {names[have]}, unused", "unset JAX_PLATFORMS"
    elif chosen:
        yield Finding("device", "ok", f"{several}CPU, which JAX_PLATFORMS={chosen[:40]} names")
        return
    elif plugins:
        text = f"{text}: {' and '.join(plugins)} is installed and finds no device"
        remedy = (
            "look at the driver with nvidia-smi" if "cuda" in plugins[0] else "is the TPU taken?"
        )
    elif have:
        text, remedy = f"{text}: there is {names[have]}, which JAX cannot use yet", INSTALL[have]
    else:
        text += ": everything runs, slower than on an accelerator"
        remedy = f'on a machine with an NVIDIA GPU {INSTALL["gpu"]}, on a TPU "jax-specdec[tpu]"'
    yield Finding("device", "warn", text, remedy)


def _exists(pattern: str) -> bool:
    return any(Path("/").glob(pattern.lstrip("/")))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def compile_cache() -> Findings:
    """Where compiled programs are kept."""
    import jax

    config: Any = jax.config
    folder = config.jax_compilation_cache_dir or str(programs_folder() or "")
    if not folder or not config.jax_enable_compilation_cache:
        yield Finding(
            "programs",
            "warn",
            "compiled anew by every command",
            "set JAX_COMPILATION_CACHE_DIR to a folder to keep them",
        )
    elif "://" in folder:
        yield Finding("programs", "ok", f"kept in {folder}")
    else:
        found = writable("programs", "kept in", Path(folder))
        if found.state == "fail" and not config.jax_compilation_cache_dir:  # nobody asked for it
            found = dataclasses.replace(found, state="warn")
        yield found


def hub_cache() -> Findings:
    """Where models of the hub are kept."""
    from huggingface_hub import constants

    yield writable("hub", "downloads are kept in", Path(constants.HF_HUB_CACHE))
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: of hub models those in the cache alone can be used"
        yield Finding("hub", "warn", text, "unset HF_HUB_OFFLINE to download")


def writable(part: str, what: str, folder: Path) -> Finding:
    """Whether a folder, or the nearest one above that exists, takes files, and how much room it has."""
    folder = folder.expanduser()
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))
    text = f"{what} {folder}"
    try:
        with tempfile.NamedTemporaryFile(dir=nearest) as file:
            file.write(b"doctor")
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        return Finding(part, "fail", f"{text}, which cannot be written: {error.strerror}")
    if free < NEARLY_FULL:
        state = "fail" if free < FULL else "warn"
        return Finding(part, state, f"{text}, where {free >> 20} MiB are free", "make room")
    return Finding(part, "ok", f"{text} ({free / 2**30:.0f} GiB free)")


def demo() -> Findings:
    """The embedded checkpoint."""
    from jax_specdec.checkpoints.embedded import demo_folder

    try:
        yield Finding("demo", "ok", f"{demo_folder()}")
    except UserError:
        text = "not installed: `jax-specdec demo` and commands without --model need it"
        yield Finding("demo", "warn", text, 'pip install "jax-specdec[demo]"')


def kinds() -> Findings:
    """Kinds of drafters, and packages of drafters that cannot be imported."""
    from jax_specdec.drafters import registry

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = registry.names()
    yield Finding("drafters", "ok", f"known kinds: {', '.join(names)}")
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            yield Finding("drafters", "warn", str(warning.message))


def memory() -> Findings:
    """Free memory of the device, and of the machine where that is another."""
    from jax_specdec.checkpoints.memory import available_memory, host_memory
    from pallas_kernels import tuning

    first = tuning.default_device()
    sizes = {"of this machine": host_memory()}
    if first.platform != "cpu":
        sizes[f"of a {first.device_kind}"] = available_memory(first)
    for whose, size in sizes.items():
        if size is not None:
            state = "warn" if size < LITTLE_MEMORY else "ok"
            yield Finding("memory", state, f"{size / 2**30:.1f} GiB {whose} are free")


def model(
    source: str | None, describe: Callable[[], dict[str, Any]], about: dict[str, Any]
) -> Findings:
    """Whether the model fits, its drafters, and which one `auto` takes; `about` gets what was described."""
    if source is not None and not here(source):
        text = f"{source} is not here: its first use downloads it, if the hub has such a model"
        yield Finding("model", "warn", text)
        return
    about |= describe()
    gib = f"{about['total_bytes'] / 2**30:.1f} GiB"
    name = "the demo's" if source is None else source
    text = (
        f"{name}: {about['num_parameters'] / 1e6:,.0f}M parameters, {gib} in {about['dtype']} for "
        f"{about['batch_size']} x {about['context_used']} tokens"
    )
    if about["fits"] is False:
        state = "fail" if about["memory"]["parameters"] > about["available_bytes"] else "warn"
        remedy = "a narrower --dtype, --int8, a smaller batch or shorter texts"
        yield Finding("model", state, f"{text}: more than is free", remedy)
    else:
        yield Finding("model", "ok", text)
    if not about["tokenizer"]:
        yield Finding("model", "fail", "it has no tokenizer beside it: text cannot be read")
    good = [name for name, wrong in about["drafters"].items() if not wrong]
    yield Finding("drafters", "ok", f"for this model: {', '.join(good)}")
    for wrong in filter(None, about["drafters"].values()):
        yield Finding("drafters", "warn", wrong)
    chosen = about["drafter"]
    text = f"auto takes {chosen['name']}:{chosen['length']} ({about['reason']})"
    yield Finding("drafters", "ok", text)
    from jax_specdec.specs.defaults import Setting, lengths_file

    file = lengths_file(Setting(Path(about["model"])).folder)
    yield writable("tune", "its measurements are kept in", file.parent)


def here(source: str) -> bool:
    """Whether a model is on this machine, or no hub id at all."""
    from jax_specdec.checkpoints.hub import HUB_ID

    if Path(source).expanduser().exists() or not HUB_ID.fullmatch(source):
        return True
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(source, local_files_only=True)
    except Exception:  # of a cache: absent, damaged or not to be read
        return False
    return True


def kernels(about: dict[str, Any]) -> Findings:
    """The back-end of attention and of the commit for a verification of the model's drafts."""
    import jax

    from pallas_kernels import tuning
    from pallas_kernels.tree_attention import automatic

    place = tuning.device()
    heads, width = about.get("num_heads", 32), about.get("head_dim", 128)
    nodes = about.get("drafter", {}).get("length", 7) + 1
    dtype = about.get("dtype", "bfloat16")
    backend, why = automatic(jax.ShapeDtypeStruct((1, nodes, heads, width), jax.numpy.dtype(dtype)))
    text = f"attention of {heads} heads of {width} in {dtype} by {backend}"
    if why is not None:
        yield Finding("kernels", "warn", f"{text}, since {why}")
    elif backend == "xla":
        yield Finding("kernels", "ok", f"{text}: there is no other kernel for a {place.platform}")
    elif tuning.file_of(place.kind).is_file():
        yield Finding("kernels", "ok", f"{text}, with block sizes measured for {place.kind}")
    else:
        text += f", with the usual block sizes: none were measured for {place.kind}"
        yield Finding("kernels", "warn", text, "python -m pallas_kernels.autotune")
