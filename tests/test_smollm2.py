"""SmolLM2-135M-Instruct, where `make smollm2` ran or its package is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_specdec as sd
from jax_specdec.checkpoints import smollm2
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.cli import main
from jax_specdec.demo import chat_prompts
from jax_specdec.errors import UserError

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
LOADING = """
import sys, threading, re, pathlib
sys.path.insert(0, {repository!r})
from benchmarks.load_memory import anonymous_bytes
import jax
from jax_specdec.checkpoints.targets import load_target, load_tokenizer
jax.devices()
load_tokenizer({source!r})
start = peak = anonymous_bytes()
done = threading.Event()
def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous_bytes())
thread = threading.Thread(target=sample)
thread.start()
target = load_target({source!r}, dtype="float32")
done.set()
thread.join()
print((peak - start) / (4 * target.config.parameter_count()))
"""


@pytest.fixture(scope="module")
def source():
    try:
        return smollm2.find()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def target(source):
    if source.suffix == ".gguf":
        pytest.importorskip("gguf")
    return sd.load_target(source, dtype="float32")


def test_speculative_chat_is_plain_chat(target):
    prompts = [
        target.tokenizer(prompt.prompt, add_special_tokens=False)["input_ids"]
        for prompt in chat_prompts(target.tokenizer)
    ]
    options = {"max_new_tokens": 48, "temperature": [0.0, 0.0, 0.0, 0.8, 0.8], "seed": 3}
    plain, fast = (
        [
            out.token_ids
            for out in sd.SpeculativeDecoder(target, drafter).generate(prompts, **options)
        ]
        for drafter in (None, sd.load_drafter("max-gram:6", target))
    )
    assert plain == fast


def test_text_that_it_was_trained_on(target):
    """Digits are words of their own: a list's number follows one token of two line breaks."""
    ids = target.tokenizer("Tips:\n\n12 a")["input_ids"]
    names = target.tokenizer.convert_ids_to_tokens(ids)
    assert names == ["Tips", ":", "\u010a\u010a", "1", "2", "\u0120a"]


def test_memory_while_loading(source):
    """Beside what transformers and the tokenizer take; on CPU a tied head is there twice."""
    code = LOADING.format(repository=str(REPOSITORY), source=str(source))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout.splitlines()[-1]) < 1.3


def test_it_is_found_by_name(source, capsys):
    assert find_checkpoint("smollm2") == source
    assert main(["info", "--model", "smollm2", "--context", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_parameters"], found["vocab_size"]) == (134_515_008, 49_152)
    assert np.isclose(found["memory"]["parameters"], 4 * 134_515_008)
