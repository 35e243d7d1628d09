"""What the benchmarks share: prompts, spreads, the machine, and JSON output."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


def read_prompts(folder: str | Path, sets: Sequence[str], per_set: int) -> list[dict[str, str]]:
    """The first `per_set` held-out prompts of each set that `checkpoints/demo/prepare.py` wrote."""
    prompts = []
    for name in sets:
        path = Path(folder) / "prompts" / f"{name}.jsonl"
        with path.open(encoding="utf-8") as lines:
            prompts += [json.loads(line) for line in lines][:per_set]
    return prompts


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def write_json(path: str | Path, record: dict[str, Any], *, quiet: bool = False) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"wrote {path}")
