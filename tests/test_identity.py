"""Identity on the embedded checkpoint: 8 prompts of 24 tokens, every drafter (see benchmarks/identity.py)."""

import sys
from pathlib import Path

import jax
import pytest

import jax_specdec as sd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from identity import TEMPERATURES, compare, transformers_greedy  # noqa: E402

TOKENS = 24
PROMPTS = [
    "Once upon a time, there was a little fox who lived under an old oak tree. One day,",
    "Lily and Tom were playing in the garden when they saw a",
    "The rain had stopped at last.",
    "Question: A baker makes 12 loaves every morning and sells 9 of them. How many loaves are left after "
    "5 days?\nAnswer:",
    "Question: Sam has 3 boxes with 8 pencils each. He gives 7 pencils away. How many has he left?\nAnswer:",
    "Task: Write a function that returns the larger of two numbers.\nCode:\n",
    "Task: Write a function to reverse a list.\nCode:\ndef",
    "One two three one two three one two three one two",
]
SETTINGS = {"T=0": 0.0, "T mixed": [TEMPERATURES[i % 3] for i in range(len(PROMPTS))]}


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Other programs of the suite are not: this target would decode five times slower."""
    options = {"xla_backend_optimization_level": 1}
    with pytest.MonkeyPatch.context() as patch:
        compile_ = jax.stages.Lowered.compile
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_(lowered, options))
        yield


@pytest.fixture(scope="module", params=["scan"])
def target(request):
    """With its 18 layers in a scan, which compiles in a tenth of the time."""
    path = ROOT / "checkpoints/demo/target"
    return sd.load_target(path, dtype="float32", layer_loop=request.param)


def answers(target, spec, batch, temperature):
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target), margins=True)
    return list(
        decoder.generate(
            PROMPTS, max_new_tokens=TOKENS, temperature=temperature, seed=7, batch_size=batch
        )
    )


@pytest.fixture(scope="module")
def plain(target):
    return {name: answers(target, "none", 1, t) for name, t in SETTINGS.items()}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "spec", ["lm:4", "glide:7", "glide:5+cape:16", "max-gram:8", "prompt-lookup:6", "bigram:3"]
)
def test_every_drafter_gives_the_tokens_of_plain_decoding(target, plain, spec, batch):
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target))
    for name, temperature in SETTINGS.items():
        out = list(
            decoder.generate(
                PROMPTS, max_new_tokens=TOKENS, temperature=temperature, seed=7, batch_size=batch
            )
        )
        verdicts = [compare(a, b) for a, b in zip(plain[name], out, strict=True)]
        assert "different" not in verdicts, (name, verdicts)


@pytest.mark.slow  # minutes of compilation
@pytest.mark.parametrize("target", ["unroll"], indirect=True)
@pytest.mark.parametrize("spec", ["lm:4", "glide:5+cape:16"])
def test_unrolled_layers(target, plain, spec):
    """What a CPU decodes with."""
    for name, temperature in SETTINGS.items():
        verdicts = [
            compare(a, b)
            for a, b in zip(plain[name], answers(target, spec, 8, temperature), strict=True)
        ]
        assert "different" not in verdicts, (name, verdicts)


def test_plain_greedy_decoding_gives_the_tokens_of_transformers(target, plain):
    pytest.importorskip("torch")
    prompts = [sd.SpeculativeDecoder(target).encode(prompt) for prompt in PROMPTS]
    peer = transformers_greedy(str(target.path), prompts, TOKENS, target.config.eos_ids)
    assert peer is not None
    verdicts = [compare(a, b) for a, b in zip(plain["T=0"], peer, strict=True)]
    assert "different" not in verdicts, verdicts
