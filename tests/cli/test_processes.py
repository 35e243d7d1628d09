"""Several processes of one program: the same text on each, written once."""

import os
import socket
import subprocess
import sys

import pytest
from commands import fails

PROMPTS = ("--prompt", "Once upon a time", "--prompt", "The cat saw a")


def command(home, *more: str) -> list[str]:
    """`generate` with the small target, two rows, sampled."""
    usual = ("--model", str(home / "target"), "--drafter", "lm:3", "--max-new-tokens", "12")
    sampled = ("--temperature", "0.8", "--seed", "3", "--batch-size", "2")
    return [sys.executable, "-m", "jax_specdec", "generate", *usual, *sampled, *more]


def environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def together(home, port: int, prompts=(PROMPTS, PROMPTS)) -> list[subprocess.CompletedProcess]:
    """Two processes of two devices each."""
    running = []
    for number, given in enumerate(prompts):
        flags = ("--mesh", "data=2,tensor=2", "--coordinator", f"localhost:{port}")
        flags += ("--num-processes", "2", "--process-id", str(number))
        running.append(
            subprocess.Popen(
                command(home, *flags, *given),
                env=environment(2),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = []
    for process in running:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
def test_two_processes_write_what_one_device_writes(tiny_checkpoints):
    alone = subprocess.run(
        command(tiny_checkpoints, *PROMPTS), env=environment(1), capture_output=True, text=True
    )
    first, second = together(tiny_checkpoints, free_port())
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == alone.stdout and alone.stdout.count("[") >= 2
    assert second.stdout == ""


@pytest.mark.slow
def test_processes_that_disagree(tiny_checkpoints):
    other = (*PROMPTS[:-1], "The dog saw a")
    done = together(tiny_checkpoints, free_port(), (PROMPTS, other))
    assert all(process.returncode != 0 for process in done)
    assert "given different requests" in done[0].stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mesh", "data=3"], "has 3 devices and there are 8: one of data=8,tensor=1, data=4"),
        (["--mesh", "colour=2"], "A mesh is AXIS=N"),
        (["--mesh", "data=2,data=1"], "names the axis data twice"),
        (["--mesh", "tensor=0"], "A mesh is AXIS=N"),
        (["--coordinator", "localhost:1"], "Several processes need a --mesh"),
        (["--mesh", "data=2", "--coordinator", "here"], "takes HOST:PORT or auto"),
        (["--mesh", "data=2", "--num-processes", "2"], "go with --coordinator HOST:PORT"),
        (["--mesh", "data=8", "--drafter", "none"], "batch_size is 2 and does not divide over 8"),
        (["--mesh", "tensor=8"], "do not divide over 8 devices"),
    ],
)
def test_wrong_use(tiny_checkpoints, capsys, flags, sentence):
    given = command(tiny_checkpoints, *PROMPTS, *flags)[3:]
    assert sentence in fails(capsys, *given)
