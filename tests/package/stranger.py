"""The first ten minutes of somebody who installs the packages: `python tests/package/stranger.py DIST`.

An empty environment, an empty home and a terminal of 80 columns, outside of the checkout. Each step is timed, and
the screen has to have what is meant for people and nothing else.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
# What no step may show: warnings, logs of libraries, places in code, objects' addresses.
NOT_FOR_PEOPLE = re.compile(
    r"Traceback|Warning|WARNING|PyTorch|site-packages/\S*\.py|^[IWEF]\d{4} |\babsl\b|\bXLA\b|0x[0-9a-f]{4}|object at",
    re.M,
)
DROPPED = ("PYTHON", "JAX_", "XLA_", "HF_", "TF_", "XDG_", "VIRTUAL_ENV", "MPL", "NO_COLOR")


def screen_of(command: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit status of a command, and what it leaves on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # so Linux says that the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    return process.wait(), rendered(output.decode("utf-8", "replace"))


def rendered(text: str) -> str:
    """The text as it stands in the end: of what is written over, the last; without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n"))
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def main(dist: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="stranger-"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    python = folder / "venv/bin/python"
    (library,) = Path(dist).resolve().glob("jax_specdec-*.whl")
    (demo,) = Path(dist).resolve().glob("jax_specdec_demo-*.whl")
    uv = [sys.executable, "-m", "uv"]  # as pip would, in a fifth of the time
    began = time.perf_counter()
    for name, command in (
        ("an environment", [*uv, "venv", str(folder / "venv")]),
        (
            "install",
            [*uv, "pip", "install", "--python", str(python), f"{library}[demo,plots]", str(demo)],
        ),
    ):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(f"== {name}\n-- {time.perf_counter() - start:.1f} s", flush=True)

    env |= {"HOME": str(folder), "COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
    program = str(folder / "venv/bin/jax-specdec")
    shutil.copy(HERE / "session.py", folder)
    for name, command in (
        ("jax-specdec --help", [program, "--help"]),
        ("jax-specdec doctor", [program, "doctor"]),
        ("jax-specdec demo", [program, "demo", "--max-new-tokens", "16"]),
        ("Python", [str(python), "session.py"]),
    ):
        start = time.perf_counter()
        status, screen = screen_of(command, folder, env)
        print(f"== {name}\n{screen}\n-- {time.perf_counter() - start:.1f} s", flush=True)
        assert status == 0, f"{name} ends with {status}"
        found = NOT_FOR_PEOPLE.search(screen)
        assert found is None, f"{name} shows {found and found[0]!r}"
    assert (folder / "acceptance.png").stat().st_size > 5000
    print(f"{time.perf_counter() - began:.0f} s in all")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
