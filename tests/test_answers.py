"""Answers of a model with a sentencepiece vocabulary: generated, streamed, stopped and regenerated."""

import json

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jax_specdec import cli
from jax_specdec.checkpoints.targets import load_tokenizer, save_pretrained
from jax_specdec.models import Decoder, ModelConfig

NAMES = ("<s>", "</s>", "\u2581", *"abcdefgh", *(f"\u2581{letter}" for letter in "abcdefgh"))
MERGES = [("\u2581", letter) for letter in "abcdefgh"]
PROMPTS = ("abba", "a b", "gaff", "he", "cab d")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    back = Tokenizer(models.BPE({name: i for i, name in enumerate(NAMES)}, MERGES))
    back.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    back.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    back.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=back, bos_token="<s>", eos_token="</s>")
    config = ModelConfig(
        vocab_size=len(NAMES) + 5,
        hidden_size=16,
        mlp_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        context=64,
        bos_id=0,
        eos_ids=(1,),
    )
    params = Decoder(config, "float32").init(jax.random.key(3))
    params["head"] = params["head"].at[:, 1].mul(3.0) * 16
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_pretrained(folder, config, params, dtype="float32", tokenizer=tokenizer)
    return folder


def run(capsys, *args):
    assert cli.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_answers_follow_their_prompts(model, capsys, tmp_path):
    """Leading spaces stay: in the answer, in a stream, and in what is written to train on."""
    tokenizer = load_tokenizer(model)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    records = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    how = ["--model", model, "--drafter", "none", "--max-new-tokens", 6]
    generate = ["generate", *how, "--prompts", prompts, "--ignore-eos"]
    answers = [json.loads(line) for line in run(capsys, *generate, "--json").splitlines()]
    for answer in answers:
        ids = tokenizer(answer["prompt"])["input_ids"] + answer["token_ids"]
        assert answer["prompt"] + answer["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert any(answer["text"].startswith(" ") for answer in answers), "choose other parameters"
    stream = "".join(f"[{answer['id']}]\n{answer['text']}\n" for answer in answers)
    assert run(capsys, *generate, "--stream") == stream

    run(capsys, "train", "regenerate", *how, "--prompts", prompts, "--out", out, "--batch-size", 5)
    for line in out.read_text().splitlines():
        document = json.loads(line)
        assert document["text"] == tokenizer.decode(document["token_ids"], skip_special_tokens=True)


def test_stops_at_a_leading_space_and_a_special_token(model, capsys):
    """`</s>` ends a row although `--ignore-eos` takes it for any other token."""
    how = ["generate", "--model", model, "--drafter", "none", "--max-new-tokens", 6, "--ignore-eos"]
    how += [arg for prompt in PROMPTS for arg in ("--prompt", prompt)]
    whole = [json.loads(line) for line in run(capsys, *how, "--json").splitlines()]
    stops = ["--stop", " ", "--stop", "</s>"]
    lines = run(capsys, *how, "--json", *stops).splitlines()
    last = set()
    for before, line in zip(whole, lines, strict=True):
        answer = json.loads(line)
        assert answer["text"] == before["text"].split(" ")[0]
        names = [NAMES[i] if i < len(NAMES) else "" for i in before["token_ids"]]
        end = next((i for i, n in enumerate(names, 1) if "\u2581" in n or n == "</s>"), None)
        assert answer["token_ids"] == before["token_ids"][:end]
        assert answer["finish_reason"] == ("stop" if end else "length")
        last |= {names[end - 1][:1]} if end else set()
    assert last == {"\u2581", "<"}, "choose other parameters"
