"""A small checkpoint, and a tokenizer to go with one."""

import pytest
from small_checkpoint import CONFIG, random_params

from jax_specdec.checkpoints.targets import save_pretrained


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    save_pretrained(path, CONFIG, random_params(CONFIG), dtype="float32")
    return path


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(46)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>"
    )
