"""Tokenizers in GGUF files: the ids of the tokenizer that was put in."""

import io
import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jax_specdec.checkpoints.gguf_tokenizer import load_tokenizer
from jax_specdec.checkpoints.targets import convert, load_target
from jax_specdec.checkpoints.targets import load_tokenizer as load_any
from jax_specdec.errors import UserError

gguf = pytest.importorskip("gguf")
from gguf_files import finish, write_gguf  # noqa: E402

TEXTS = (
    "Once upon a time, there was a little girl named Lily. She had a red ball.",
    "1.\n\n2. 1234567 and  42\n\n\n7",
    "def add(a, b):\n    return a + b  # it's 100 %",
    "e\u0301 \u65e5\u672c \U0001f600 na\u00efve \u00b2\u00bd",
    "</s><s> a <pad>b",
)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoints, tmp_path_factory):
    folder = tiny_checkpoints / "target"
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, folder, tokenizer=load_any(folder)), load_any(folder)


def test_a_tokenizer_is_the_one_that_was_put_in(tiny, tmp_path):
    path, want = tiny
    got = load_target(path).tokenizer
    assert got(list(TEXTS))["input_ids"] == want(list(TEXTS))["input_ids"]
    assert got.get_vocab() == want.get_vocab()
    assert got.chat_template == want.chat_template
    assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (0, 1, 2)
    convert(path, tmp_path / "m")
    again = load_target(tmp_path / "m").tokenizer
    assert again(list(TEXTS))["input_ids"] == want(list(TEXTS))["input_ids"]
    assert again.chat_template == want.chat_template


LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# Of tiktoken's o200k_base.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS[:-1]}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS[:-1]}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def published(pre):
    """The steps of the tokenizer.json that a name stands for, of the model that it was named for."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def words(pattern):
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), level]
        )

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": (None, whole),
        "smollm": (None, pre_tokenizers.Sequence([digits, whole])),
        "llama-bpe": (None, words(f"{ENDINGS}{LETTERS}|\\p{{N}}{{1,3}}{REST}")),
        "qwen2": (normalizers.NFC(), words(f"{ENDINGS}{LETTERS}|\\p{{N}}{REST}")),
        "gpt-4o": (None, words(O200K)),
    }[pre]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o"])
def test_words_are_split_as_their_model_does(pre, tmp_path):
    """Trained without splitting, so that every way to split shows."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    path = tmp_path / "x.gguf"
    write_vocabulary(path, "gpt2", tokens, pre=pre, merges=[" ".join(p) for p in model["merges"]])
    trained.normalizer, trained.pre_tokenizer = published(pre)
    trained.model.ignore_merges = pre == "llama-bpe"
    got = load_tokenizer(path)
    for text in TEXTS[:4]:
        want = trained.encode(text).ids
        assert got(text, add_special_tokens=False)["input_ids"] == want
        kept = trained.normalizer.normalize_str(text) if pre == "qwen2" else text
        assert got.decode(want) == kept


def write_vocabulary(
    path, model, tokens, *, pre=None, merges=None, scores=None, kinds=None, more=()
):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(tokens))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in more:
        {bool: writer.add_bool, int: writer.add_uint32}[type(value)](f"tokenizer.ggml.{key}", value)
    finish(writer)
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """Against the library itself, from the pieces, scores and types of its model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS[:3] for line in text.split("\n")] * 4),
        model_writer=made,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    count = theirs.vocab_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(count)
    ]
    path = write_vocabulary(
        tmp_path / "x.gguf",
        "llama",
        [theirs.id_to_piece(i) for i in range(count)],
        scores=[theirs.get_score(i) for i in range(count)],
        kinds=kinds,
        more=[("add_space_prefix", prefix), ("bos_token_id", 1), ("unknown_token_id", 0)],
    )
    ours = load_tokenizer(path)
    for text in (*TEXTS[:4], "a  b", "\u00e9"):
        want = theirs.encode(text)
        assert ours(text)["input_ids"] == [1, *want]
        assert ours.decode(want) == text


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("bert", {}, "of type 'bert'; gpt2 and llama"),
        ("gpt2", {"pre": "default", "merges": []}, "'default' .* known are gpt-2"),
        ("gpt2", {"merges": []}, "does not say how it splits words"),
        ("gpt2", {"pre": "qwen2"}, "merges as a list of texts"),
        ("gpt2", {"pre": "qwen2", "merges": ["a c"]}, "cannot be read"),
        ("llama", {"scores": [0.0, 0.0], "more": [("bos_token_id", 9)]}, "'9' of 2 tokens"),
        ("llama", {}, "a score to each of its 2 tokens"),
        ("llama", {"scores": [0.0]}, "a score to each of its 2 tokens"),
        ("gpt2", {"pre": "qwen2", "merges": [], "kinds": [1]}, "one name and one type"),
    ],
)
def test_what_is_no_tokenizer(model, options, message, tmp_path):
    path = write_vocabulary(tmp_path / "x.gguf", model, ["a", "b"], **options)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_without_a_tokenizer(tmp_path):
    finish(gguf.GGUFWriter(tmp_path / "x.gguf", "llama"))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_any(tmp_path / "x.gguf")
