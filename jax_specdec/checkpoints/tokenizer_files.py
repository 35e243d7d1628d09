"""A checkpoint's tokenizer: which files it may have, and loading them."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from jax_specdec import progress
from jax_specdec.checkpoints import gguf_tokenizer
from jax_specdec.checkpoints.gguf_file import is_gguf
from jax_specdec.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer: one file, a vocabulary with its merges, or a GGUF file's."""
    if is_gguf(folder):
        return gguf_tokenizer.has_tokenizer(folder)
    sets = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in names) for names in sets)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer of a checkpoint from its own files.

    Raises:
      UserError: it has none, or transformers cannot load it.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_tokenizer.load_tokenizer(folder)
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with "
            "merges.txt."
        )
    _check_sentencepiece(folder)
    # Only tokenizers are used of transformers, which otherwise tells each user that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    progress.import_tqdm()  # which transformers would
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a bad file
        reason = str(error).strip().split("\n")[0]
        if not reason or isinstance(error, (AttributeError, LookupError, TypeError)):
            reason = "its files are not what transformers writes"
        raise UserError(f"The tokenizer in {folder} cannot be loaded: {reason:.300}") from error


def _check_sentencepiece(folder: Path) -> None:
    """transformers asks for tiktoken where sentencepiece is what is missing."""
    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not model.is_file():
        return
    with model.open("rb") as file:
        first = file.read(1)
    # A sentencepiece model is a protocol buffer and begins with its field 1; tiktoken's is base64 text.
    if first == b"\n" and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder} has a sentencepiece tokenizer (tokenizer.model) and no tokenizer.json: "
            "pip install 'jax-specdec[sentencepiece]'."
        )
