"""Byte-level BPE, trained with `tokenizers` and saved as a Hugging Face tokenizer folder."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jax_specdec.errors import UserError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A chat with the demo model is a word problem and its solution, the shape it was trained on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: str | Path, *, context: int = 1024
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE and writes `tokenizer.json` and its config to the folder `out`.

    Any byte sequence encodes (the 256 bytes are in the vocabulary), digits are single tokens, and a
    text starts with `<s>`. `vocab_size` counts the three special tokens.
    """
    if vocab_size < 259:
        raise UserError(f"A byte-level vocabulary needs at least 259 entries, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(str(out))
    return fast
