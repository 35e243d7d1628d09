"""What a run trains on, as people give it: texts, token ids, answers and JSONL files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_specdec.errors import UserError, a_kind, shown
from jax_specdec.generation import Generation
from jax_specdec.text.chat import chat_ids, check_text
from jax_specdec.text.inputs import is_chat
from jax_specdec.text.token_bytes import id_bound
from jax_specdec.training.data import Documents, Mixed, encode_items, read_documents


class Source(NamedTuple):
    """Where documents come from.

    Attributes:
      data: a file, or one document: a text, token ids, or a `Generation`.
      weight: a file's share of the windows, None where all text counts alike.
    """

    data: Any
    weight: float | None = None


def as_sources(data: Any, what: str = "data") -> list[Source]:
    """Training data as sources.

    Args:
      data: a JSONL file; several of them with weights, `{file: weight}`; or a list of files, texts, token ids and
        answers. A name that ends in `.jsonl` is a file, and so is a `Path`; any other string is a text.

    >>> as_sources({"train.jsonl": 2, "written.jsonl": 1})[0]
    Source(data='train.jsonl', weight=2.0)

    Raises:
      UserError: data of another type, no data, or a weight that is not above 0.
    """
    kinds = "a JSONL file, {file: weight}, or a list of texts, token ids, answers or files"
    if isinstance(data, Mapping):
        sources = []
        for name, weight in data.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 < weight < float("inf"):
                raise UserError(f"The weight of {shown(name)} must be a number above 0.")
            if not _is_file(name):
                raise UserError(f"Weights are of JSONL files, and {shown(name)} is none.")
            sources.append(Source(name, float(weight)))
    elif _is_file(data) or isinstance(data, Generation):
        sources = [Source(data)]
    elif isinstance(data, str):
        raise UserError(f"The {what} is one text alone, {shown(data)}: give {kinds}.")
    elif isinstance(data, Sequence) and not isinstance(data, bytes):
        sources = [Source(item) for item in data]
    else:
        raise UserError(f"The {what} must be {kinds}, not {a_kind(data)}.")
    if not sources:
        raise UserError(f"The {what} is empty: give {kinds}.")
    return sources


def _is_file(item: Any) -> bool:
    return isinstance(item, Path) or (isinstance(item, str) and item.endswith(".jsonl"))


def documents_of(sources: Sequence[Source], tokenizer: Any) -> list[np.ndarray]:
    """Token ids `int32[n]` of every document, in the order of the sources; texts are ended.

    An answer is its prompt and what was generated, as `train regenerate` writes it.

    Raises:
      UserError: an item of another type, ids outside the vocabulary, or as `read_documents`.
    """
    bound, items = id_bound(tokenizer), []
    for place, (item, _) in enumerate(sources):
        if _is_file(item):
            items += read_documents([item], tokenizer)
        elif isinstance(item, str):
            if not item:
                raise UserError(
                    f"Item {place} of the training data is an empty text: leave it out."
                )
            check_text(item, f"Item {place} of the training data")
            items.append(item)
        else:
            items.append(_ids(item, place, tokenizer, bound))
    return encode_items(items, tokenizer)


def _ids(item: Any, place: int, tokenizer: Any, bound: int) -> np.ndarray:
    if isinstance(item, Generation):
        prompt = item.prompt
        if isinstance(prompt, str):
            prompt = tokenizer(prompt, verbose=False)["input_ids"]
        elif is_chat(prompt):
            prompt = chat_ids(tokenizer, prompt)
        item = [*prompt, *item.token_ids]
    try:
        ids = np.asarray(item)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    if isinstance(item, bytes) or ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise UserError(
            f"Item {place} of the training data is {a_kind(item)}: texts, lists of token ids, answers and JSONL "
            "files are read."
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < bound):
        raise UserError(
            f"Item {place} of the training data has token ids outside the vocabulary of {bound}."
        )
    return ids.astype(np.int32)


def load_documents(
    sources: Sequence[Source],
    tokenizer: Any,
    length: int,
    *,
    heldout: Sequence[Source] = (),
    heldout_share: float = 0.02,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Documents, list[np.ndarray]]:
    """Token ids of the training documents and of the held-out ones.

    Where a source has a weight, one without has the weight 1; the held-out share is taken from each of them.

    Args:
      length: of the windows, in tokens. heldout: what to measure on; without, every so many documents as
        `heldout_share` says.

    Raises:
      UserError: as `documents_of`, or too little to train or measure on.
    """
    if tokenizer is None:
        raise UserError("Training needs a tokenizer: load the target with one.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-text token, which separates documents.")
    mixed = any(source.weight is not None for source in sources)
    groups = [[source] for source in sources] if mixed else [list(sources)]
    parts = [documents_of(group, tokenizer) for group in groups]
    if heldout:
        measured = documents_of(heldout, tokenizer)
    else:
        if not 0 < heldout_share <= 0.5:
            raise UserError(f"The share that is held out must be in (0, 0.5], got {heldout_share}.")
        every = round(1 / heldout_share)
        measured = [ids for part in parts for ids in part[::every]]
        parts = [[ids for i, ids in enumerate(part) if i % every] for part in parts]
        if not all(parts):
            raise UserError(
                "One document cannot be both data and held out: give held-out text of its own."
            )
    report(f"{sum(len(ids) for part in parts for ids in part):,} tokens of data")
    weights = tuple(1.0 if source.weight is None else source.weight for source in sources)
    documents = Mixed(tuple(parts), weights) if mixed else parts[0]
    tokens = sum(map(len, measured))
    if tokens <= length:
        raise UserError(
            f"The held-out documents have {tokens} tokens, fewer than one window of {length + 1}: give more, or "
            "shorter windows (sequence_length)."
        )
    return documents, measured
