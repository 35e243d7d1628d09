"""Several processes of one program: the same text on each, written once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
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


def train(home, out, steps: int, *more: str) -> list[str]:
    """`train glide` beside the small target, its state saved at each step."""
    usual = (
        "--target",
        str(home / "target"),
        "--data",
        str(home / "data.jsonl"),
        "--out",
        str(out),
    )
    sizes = ("--sequence-length", "16", "--batch-size", "4", "--heldout-share", "0.2")
    often = ("--steps", str(steps), "--save-every", "1", "--eval-every", str(steps))
    return [sys.executable, "-m", "jax_specdec", "train", "glide", *usual, *sizes, *often, *more]


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_killed_in_two_processes_goes_on_in_one(tiny_checkpoints, tmp_path):
    """Both are killed, unasked; one device goes on, and its losses are those of a run that nobody killed."""
    shutil.copytree(tiny_checkpoints / "target", tmp_path / "target")
    texts = [
        {"text": f"The cat saw {i} dogs and Lily ran away with {i % 7} balls."} for i in range(60)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    steps, whole, cut, port = 30, tmp_path / "whole", tmp_path / "cut", free_port()
    alone = subprocess.run(
        train(tmp_path, whole, steps), env=environment(1), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    flags = (
        "--mesh",
        "data=2,tensor=2",
        "--coordinator",
        f"localhost:{port}",
        "--num-processes",
        "2",
    )
    with (tmp_path / "log").open("w") as log:
        running = [
            subprocess.Popen(
                train(tmp_path, cut, steps, *flags, "--process-id", str(number)),
                env=environment(2),
                stdout=log,
                stderr=log,
            )
            for number in range(2)
        ]
        until = time.monotonic() + 480
        while not (cut / "state" / "3").is_dir():
            said = (tmp_path / "log").read_text()
            assert all(process.poll() is None for process in running), said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        for process in running:
            process.kill()
            process.wait()
    before = losses(cut)
    assert 3 <= len(before) < steps
    resumed = subprocess.run(
        train(tmp_path, cut, steps, "--resume"), env=environment(1), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert losses(cut)[:2] == before[:2] and len(losses(cut)) == steps
    np.testing.assert_allclose(losses(cut), losses(whole), rtol=2e-3)


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_find_each_other(tiny_checkpoints, process):
    """The first waits for the second in vain, or the second for the first."""
    shorter = "from jax_specdec.cli import main, mesh; mesh.TIMEOUT_S = 3; raise SystemExit(main())"
    flags = ("--mesh", "data=2", "--coordinator", f"localhost:{free_port()}")
    flags += ("--num-processes", "2", "--process-id", str(process))
    given = command(tiny_checkpoints, *flags, *PROMPTS)[3:]
    done = subprocess.run(
        [sys.executable, "-c", shorter, *given], env=environment(1), capture_output=True, text=True
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: The processes did not find each other at localhost:")
    assert said.endswith("within 3 s.")


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
