"""A chat model of 32 tokens: a tokenizer with a template, and decoders by the name of their drafter."""

import dataclasses
import functools
from pathlib import Path

import drafters as d
import helpers as h
import recurrent as r
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_specdec import Decoder, SpeculativeDecoder, Target
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.specs.build import LoadedDrafter

EOS = 1
# Those that a template writes and a model may write, too, and letters up to w. "a" and "b" have a token together, so what
# a model writes letter by letter is not how the tokenizer would spell it.
NAMES = ("<s>", "</s>", "<u>", "<b>", *"abcdefghijklmnopqrstuvw", "ab", "cd", "Ġ", ".", "?")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</s>"
    "{% elif m.role == 'assistant' %}<b>{{ m.content }}</s>{% else %}<s>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<b>{% if loud %}?{% endif %}{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {name: i for i, name in enumerate(NAMES)}
    back = Tokenizer(models.BPE(vocab, [("a", "b"), ("c", "d")]))
    back.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    back.decoder = decoders.ByteLevel()
    back.add_tokens([AddedToken(name, special=False) for name in ("<s>", "<u>", "<b>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=back, eos_token="</s>", chat_template=TEMPLATE, model_max_length=1 << 20
    )


def decoder_of(name: str, context: int = 512) -> SpeculativeDecoder:
    config = dataclasses.replace(h.CONFIG, eos_ids=(EOS,), context=context)
    target = Target(Decoder(config), h.target_params(), tokenizer(), Path())
    if name == "lm of its own kind":  # whose caches do not say that they go back
        drafter, params = LmDrafter(r.MODEL, 3), {"lm": r.close_weights()}
    else:
        drafter, params = d.made(name)
    return SpeculativeDecoder(target, LoadedDrafter(drafter, params, name), margins=True)
