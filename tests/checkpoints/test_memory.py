"""The memory that loading plans for, and what it takes."""

import runpy
from pathlib import Path

import pytest
from small_checkpoint import CONFIG, TESTS

from jax_specdec.checkpoints import memory
from jax_specdec.errors import UserError


def test_memory_plan():
    plan = memory.memory_plan(CONFIG, "bfloat16", batch=4, slots=100, width=8)
    assert plan.parameters == 2 * CONFIG.parameter_count()
    assert plan.cache == 2 * 3 * 4 * 2 * 100 * 8 * 2
    assert plan.logits == 4 * 8 * 48 * 4
    assert plan.total == plan.parameters + plan.cache + plan.logits


def test_memory_plan_refuses():
    plan = memory.memory_plan
    for call, sentence in (
        (lambda: plan(CONFIG, "int4", 1, 1), r"'int4': .* give int8=\(\"weights\",\)"),
        (
            lambda: plan(CONFIG, None, 1, 1),
            "dtype must be float32, bfloat16 or float16, not 'None'",
        ),
        (
            lambda: plan(CONFIG, "float32", -8, 1),
            "batch must be at least 0, a whole number, got -8",
        ),
        (lambda: plan(CONFIG, "float32", 1, 0.5), "slots must be at least 0"),
        (lambda: plan(CONFIG, "float32", 1, 1, width=0), "width must be at least 1"),
        (lambda: plan(CONFIG, "float32", 1, 1, int8="weights"), "int8 is of weights and cache"),
        (lambda: plan({}, "float32", 1, 1), "of a ModelConfig, not a dict"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()


def test_check_fits():
    plan = memory.MemoryPlan(parameters=13 * 2**30, cache=2**30, logits=0)
    memory.check_fits(plan, None)
    memory.check_fits(plan, plan.total)
    with pytest.raises(UserError) as caught:
        memory.check_fits(plan, 8 * 2**30)
    assert str(caught.value).startswith(
        "This needs 14.00 GiB (parameters 13.00 GiB, cache 1.00 GiB) but 8.00 GiB are free:"
    )


def test_available_memory():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.available_memory(Device({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert memory.available_memory(Device(None)) is None
    if Path("/proc/meminfo").is_file():
        assert memory.available_memory() > 2**20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_peak_memory_of_loading(layer_loop, tmp_path, size_mb=256):
    """benchmarks/load_memory.py measures 2 GB the same way."""
    script = runpy.run_path(str(TESTS.parent / "benchmarks/load_memory.py"))
    script["write_checkpoint"](tmp_path, size_mb * 2**20)
    (result,) = script["measure_fresh"](tmp_path, layer_loop)
    assert result["checkpoint_bytes"] > size_mb * 2**20
    assert 1.0 <= result["peak_over_share"] < 1.3
