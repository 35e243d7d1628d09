"""Every test runs with strict promotion, and with eight CPU devices unless told otherwise."""

import gc
import os
import shutil
from pathlib import Path

import checked
import jax
import pytest

checked.install()
pytest.register_assert_rewrite("enumeration", "loop_runs", "small_checkpoint")

# What one test has compiled, no other test, worker, command or run compiles again. JAX's key holds its
# version, the compiler's flags and the program.
CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
CACHE_BYTES = 4 << 30
for setting, value in (
    ("JAX_COMPILATION_CACHE_DIR", str(CACHE)),
    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
):
    os.environ.setdefault(setting, value)  # for the commands that tests start
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)

# Most of the suite's time is compilation, and next to none goes into running what was compiled; with these
# flags, compiling takes a fifth of the time. JAX reads them when its first back-end starts, which no import
# does; commands that tests start inherit them.
FAST: dict[str, object] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    FAST["xla_cpu_use_fusion_emitters"] = "false"
FLAGS = os.environ.get("XLA_FLAGS", "")
more = [f"--{flag}={value}" for flag, value in FAST.items() if flag not in FLAGS]
os.environ["XLA_FLAGS"] = " ".join([FLAGS, *more]).strip()

# Tracing makes many objects, nearly all of which stay: looking for garbage among them took a sixth of its time.
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.config.jax_num_cpu_devices < 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Nothing else ever shortens the cache of compiled programs."""
    if hasattr(config, "workerinput") or not CACHE.is_dir():
        return
    if sum(file.stat().st_size for file in CACHE.iterdir()) > CACHE_BYTES:
        shutil.rmtree(CACHE)


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Marks what `slow_cases.txt` and `more_cases.txt` list."""
    root, whole = Path(__file__).parents[1], config.args == config.getini("testpaths")
    for mark in ("slow", "more"):
        file = Path(__file__).parent / f"{mark}_cases.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        listed = {line for line in lines if line and not line.startswith("#")}
        for item in items:
            name = f"{item.path.relative_to(root)}::{item.nodeid.partition('::')[2]}"
            if name in listed:
                item.add_marker(mark)
                listed.remove(name)
        if listed and whole:  # of a part of the suite, many of them are not there
            raise pytest.UsageError(f"{file.name} lists what does not exist: {sorted(listed)[0]}")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are dropped after each module: Linux allows a process 65,530 memory maps, each
    program takes several, and XLA crashes where there are no more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def one_width():
    """Decoders have rounds of one width, since each further one costs another round's compilation; see `budgets`."""
    from jax_specdec import pipeline

    class OneWidth(pipeline.DecodeLoop):
        def budgeted(self):
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DecodeLoop", OneWidth)
        yield


@pytest.fixture(scope="module")
def budgets(one_width):
    """In a module's tests decoders have rounds as deep and wide as pays, which is the default."""
    from jax_specdec import DecodeLoop, pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DecodeLoop", DecodeLoop)
        yield


@pytest.fixture(scope="session", autouse=True)
def equal_costs(tmp_path_factory):
    """What rounds cost is not measured, so that what a test counts does not depend on the machine's load, and
    nothing is written to the user's cache, which commands that tests start do measure and write."""
    from jax_specdec.tuning import round_costs

    def equal(_, loop, *rest):
        return loop.unknown_costs()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(round_costs, "measure", lambda *args: (equal(None, *args), True))
        patch.setattr(round_costs, "computed_costs", equal)
        yield


@pytest.fixture(scope="module")
def two_devices():
    """For training, which takes all that there are: small batches do not divide over eight."""
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:2])
        yield


TINY_TEXTS = (
    "Once upon a time, there was a little girl named Lily. She had a red ball.",
    "One day, the cat saw a big dog. The dog was happy and the cat ran away.",
    "Question: Tom has 3 apples and buys 4 more. How many apples has he?\nAnswer: 3 + 4 = 7",
    "Task: Write a function to add two numbers.\nCode:\ndef add(a, b):\n    return a + b",
)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> Path:
    """A folder like the demo's: `target`, `lm` and `bigram`, from random weights; do not write to it.

    The draft model is the target without its upper layers, which are scaled down, so that it is
    often right. The head is scaled up, so that there are hardly any near ties.
    """
    import dataclasses

    from jax_specdec.checkpoints.targets import save_pretrained
    from jax_specdec.drafters.bigram import count_bigrams, save_bigram
    from jax_specdec.models import Decoder, ModelConfig
    from jax_specdec.training.data import encode_documents
    from jax_specdec.training.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(TINY_TEXTS, 300, home / "tokenizer", context=256)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        mlp_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context=256,
        bos_id=tokenizer.bos_token_id,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    params = Decoder(config, "float32").init(jax.random.key(1))
    lower, *upper = params["layers"]
    for block in upper:
        for name in ("out", "down"):
            block[name] = block[name] * 0.3
    params = {**params, "layers": (lower, *upper), "head": params["head"] * 16}
    save_pretrained(home / "target", config, params, dtype="float32", tokenizer=tokenizer)
    small = dataclasses.replace(config, num_layers=1, windows=())
    params = {**params, "layers": (lower,)}
    save_pretrained(home / "lm", small, params, dtype="float32", tokenizer=tokenizer)
    documents = encode_documents(TINY_TEXTS, tokenizer)
    save_bigram(home / "bigram", count_bigrams(documents, config.vocab_size))
    return home
