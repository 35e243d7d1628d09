"""JSONL texts to packed training windows, served by grain with random access.

Every batch is a function of (seed, step) alone, which is what makes resuming exact.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from jax_specdec.errors import UserError
from jax_specdec.text.chat import check_text
from jax_specdec.text.jsonl import read_jsonl
from jax_specdec.text.token_bytes import id_bound


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Documents of several sources; each gets its share of the windows, whatever its size.

    Attributes:
      sources: documents of each. weights: above 0; shares are proportional to them.
    """

    sources: tuple[Sequence[np.ndarray], ...]
    weights: tuple[float, ...]


Documents = Sequence[np.ndarray] | Mixed


def fingerprint(documents: Documents, heldout: Sequence[np.ndarray]) -> str:
    """SHA-256 of the token ids of what a run trains on and is measured on, in their order."""
    digest = hashlib.sha256()
    sources = documents.sources if isinstance(documents, Mixed) else (documents,)
    for source in (*sources, heldout):
        digest.update(len(source).to_bytes(8, "little"))
        for ids in source:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def read_texts(path: str | Path) -> list[str]:
    """The `text` field of every record of a JSONL file."""
    texts = []
    for number, record in read_jsonl(path):
        if not isinstance(record.get("text"), str):
            raise UserError(f'{path}, line {number}: expected a string in "text".')
        check_text(record["text"], f"{path}, line {number}: the text")
        texts.append(record["text"])
    if not texts:
        raise UserError(f"{path} holds no records.")
    return texts


def encode_documents(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
    """Token ids of each text with the end-of-text token appended, `int32[n]`."""
    ids = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    return [np.asarray([*row, tokenizer.eos_token_id], np.int32) for row in ids]


def encode_items(items: Sequence[str | np.ndarray], tokenizer) -> list[np.ndarray]:
    """Documents as token ids, `int32[n]`: texts as `encode_documents` gives them, ids as they are."""
    texts = [item for item in items if isinstance(item, str)]
    encoded = iter(encode_documents(texts, tokenizer) if texts else ())
    return [next(encoded) if isinstance(item, str) else item for item in items]


def read_documents(paths: Sequence[str | Path], tokenizer) -> list[np.ndarray]:
    """Documents of JSONL files as token ids, `int32[n]`.

    A record's `token_ids` are taken as they are (what a target wrote, ended or not); a `text` alone is
    tokenised and ended with the end-of-text token.

    Raises:
      UserError: a record with neither, or ids outside the vocabulary, named by its line.
    """
    documents: list[np.ndarray] = []
    bound = id_bound(tokenizer)
    for path in paths:
        items: list[str | np.ndarray] = []
        for number, record in read_jsonl(path):
            ids = record.get("token_ids")
            if ids is None:
                if not isinstance(record.get("text"), str):
                    raise UserError(f'{path}, line {number}: expected a string in "text".')
                check_text(record["text"], f"{path}, line {number}: the text")
                items.append(record["text"])
                continue
            good = isinstance(ids, list) and all(type(i) is int for i in ids)
            if not good or not all(0 <= i < bound for i in ids):
                raise UserError(
                    f'{path}, line {number}: "token_ids" must be a list of ids in the vocabulary of '
                    f"{bound}."
                )
            items.append(np.asarray(ids, np.int32))
        if not items:
            raise UserError(f"{path} holds no records.")
        documents += encode_items(items, tokenizer)
    return documents


class PackedWindows:
    """Documents concatenated and cut into windows of `length + 1` tokens, shuffled every epoch.

    Item i belongs to epoch `i // windows_per_epoch`; its epoch's document order is drawn from
    (seed, epoch). Documents follow one another without a mask between them, as in GPT-2.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int, seed: int, items: int):
        self._documents = list(documents)
        self._length = length
        self._seed = seed
        self._items = items
        self.tokens_per_epoch = sum(map(len, self._documents))
        self._windows = self.tokens_per_epoch // (length + 1)
        if self._windows < 1:
            raise UserError(
                f"The data holds {self.tokens_per_epoch} tokens, fewer than one window of {length + 1}."
            )
        self._epoch = -1
        self._stream = np.zeros((0,), np.int32)

    def __len__(self) -> int:
        return self._items

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, window = divmod(int(index), self._windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._documents))
            stream = np.concatenate([self._documents[i] for i in order])
            cut = self._windows * (self._length + 1)
            windows = stream[:cut].reshape(self._windows, self._length + 1)
            self._stream = windows[rng.permutation(self._windows)]
            self._epoch = epoch
        return self._stream[window]


def training_batches(
    documents: Documents, length: int, batch: int, steps: int, seed: int
) -> grain.MapDataset:
    """A grain dataset whose item `step` is `int32[batch, length + 1]`.

    Mixed sources take turns in a fixed order, each going through its own epochs.
    """

    def windows(documents: Sequence[np.ndarray]) -> grain.MapDataset:
        return grain.MapDataset.source(PackedWindows(documents, length, seed, steps * batch))

    if isinstance(documents, Mixed):
        parts = [windows(source) for source in documents.sources]
        return grain.MapDataset.mix(parts, documents.weights).batch(batch, drop_remainder=True)
    return windows(documents).batch(batch, drop_remainder=True)


def heldout_windows(documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """All held-out documents in order, `int32[windows, length + 1]`."""
    source = PackedWindows(documents, length, 0, 1)
    stream = np.concatenate(list(documents))
    count = source.tokens_per_epoch // (length + 1)
    return stream[: count * (length + 1)].reshape(count, length + 1)
