"""`--mesh` and the flags of several processes."""

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common
from jax_specdec.errors import RunError, UserError, shown

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("data", "tensor")
TIMEOUT_S = 60  # for all processes to reach the coordinator


def add_mesh(parser: argparse.ArgumentParser, default: str = "one device") -> None:
    """`--mesh`, `--coordinator`, `--num-processes`, `--process-id`; `default` says what is without `--mesh`."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="divide rows over the axis data and the model over tensor, as in data=2,tensor=4 "
        f"(default: {default})",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, the address of process 0; `auto` asks the cluster (TPU pods, Slurm, "
        f"Open MPI, Kubernetes). All of them must be there within {TIMEOUT_S} s",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as sizes of both axes.

    >>> parse_mesh("tensor=4")
    {'data': 1, 'tensor': 4}
    """
    sizes: dict[str, int] = {axis: 1 for axis in AXES}
    given = set()
    for item in text.split(","):
        name, equals, number = item.strip().partition("=")
        if name not in AXES or not equals or not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"A mesh is AXIS=N,... of {' and '.join(AXES)}, as in data=2,tensor=4, not {shown(text)}."
            )
        if name in given:
            raise UserError(f"The mesh {text[:80]} names the axis {name} twice.")
        given.add(name)
        sizes[name] = int(number)
    return sizes


def start(args: argparse.Namespace) -> "Mesh | None":
    """Joins the other processes, if there are any, and lays out the mesh; None for one device.

    Raises:
      UserError: flags that do not go together, or a mesh of other than all devices.
      RunError: the processes did not find each other.
    """
    sizes = None if args.mesh is None else parse_mesh(args.mesh)
    numbers = (args.num_processes, args.process_id)
    if args.coordinator in (None, "auto") and numbers != (None, None):
        raise UserError("--num-processes and --process-id go with --coordinator HOST:PORT.")
    if args.coordinator is not None:
        if sizes is None:
            raise UserError("Several processes need a --mesh over all their devices.")
        _join(args)
    if sizes is None:
        return None
    return make_mesh(sizes)


def make_mesh(sizes: dict[str, int]) -> "Mesh":
    """A mesh of all devices of all processes."""
    import jax
    from jax.sharding import AxisType

    devices = jax.devices()
    wanted = sizes["data"] * sizes["tensor"]
    if wanted != len(devices):
        shown_as = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"The mesh {shown_as} has {wanted} devices and there are {len(devices)}: one of "
            f"{', '.join(fitting(len(devices)))} fits."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def fitting(devices: int) -> list[str]:
    """The meshes of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [f"data={devices // n},tensor={n}" for n in divisors]


def _join(args: argparse.Namespace) -> None:
    import jax

    options: dict[str, Any] = {}
    if args.coordinator != "auto":
        host, colon, port = args.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise UserError(
                f"--coordinator takes HOST:PORT or auto, not {shown(args.coordinator)}."
            )
        count, number = args.num_processes, args.process_id
        if count is None or number is None or not 0 <= number < count:
            raise UserError(
                "--coordinator HOST:PORT needs --num-processes N and --process-id from 0 to N - 1."
            )
        options = {
            "coordinator_address": args.coordinator,
            "num_processes": count,
            "process_id": number,
        }
    failed = f"The processes did not find each other at {args.coordinator} within {TIMEOUT_S} s"
    with _end_after(TIMEOUT_S, failed):
        try:
            jax.distributed.initialize(initialization_timeout=2 * TIMEOUT_S, **options)
        except Exception as error:  # of several libraries beneath
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"{failed}: {reason[:300]}") from error
    if not first():
        common.hush()
    # Collectives of CPU report to standard output, which is for results.
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _end_after(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the process with a sentence: at its own limit JAX's runtime aborts, with a stack trace of C++."""

    def end() -> None:
        os.write(2, f"error: {sentence}.\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first() -> bool:
    """Whether this process prints: one of them does."""
    import jax

    return jax.process_index() == 0
