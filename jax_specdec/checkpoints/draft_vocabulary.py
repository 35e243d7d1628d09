"""The draft vocabulary of a checkpoint folder: `draft_vocabulary.json`, beside any model drafter's weights.

    {"vocab_size": 49152, "ids": [0, 1, 2, 17, ...]}

`vocab_size` is the target's rows of logits, and `ids`, increasing, the tokens that may be drafted.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_specdec._types import Params
from jax_specdec.checkpoints.tensor_files import read_json
from jax_specdec.core.sharding import Sharding
from jax_specdec.errors import RunError, UserError
from jax_specdec.models.draft_vocabulary import narrow
from jax_specdec.user_cache import write_whole

FILE = "draft_vocabulary.json"


def most_frequent(
    texts: Iterable[Sequence[int] | np.ndarray], size: int, vocab_size: int, ends: Iterable[int]
) -> np.ndarray:
    """The tokens that texts have most often, and those that end a text: `int32[size]`, increasing.

    Among equally frequent tokens the first ones count, which tokenizers by merges have learned first.

    Raises:
      UserError: a size that holds no token beside the ends, or more than the vocabulary.
    """
    ends = sorted(set(ends))
    if not len(ends) < size <= vocab_size:
        raise UserError(
            f"A draft vocabulary has more than {len(ends)} and at most {vocab_size} tokens, not {size} (--size)."
        )
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        tokens = np.asarray(text, np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise UserError(
                f"A text has token {int(tokens.max())}, and the vocabulary {vocab_size}."
            )
        counts += np.bincount(tokens, minlength=vocab_size)
    counts[ends] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def write_draft_vocabulary(
    folder: str | os.PathLike[str], ids: Sequence[int] | np.ndarray, vocab_size: int
) -> Path:
    """Writes the file into a drafter's folder, in place of an older one; returns its path.

    Raises:
      RunError: the folder cannot be written.
    """
    path = Path(folder) / FILE
    listed = ", ".join(str(int(i)) for i in ids)
    try:
        write_whole(path, f'{{"vocab_size": {vocab_size}, "ids": [{listed}]}}\n')
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}).") from error
    return path


def read_draft_vocabulary(folder: Path, target: Any) -> np.ndarray | None:
    """The draft vocabulary in a drafter's folder, None where it has none.

    Args:
      target: a loaded one, or what `info` makes of its folder.

    Raises:
      UserError: it is damaged, of another vocabulary, or without a token that ends the target's texts.
    """
    path = Path(folder) / FILE
    if not (path.exists() or path.is_symlink()):
        return None
    found = read_json(path)
    ids: Any = found.get("ids")
    rows = found.get("vocab_size")
    listed = isinstance(ids, list) and ids
    if not listed or not all(isinstance(i, int) and not isinstance(i, bool) for i in [*ids, rows]):
        raise UserError(f"{path} must have a vocab_size and ids, whole numbers.")
    if rows != target.vocab_size:
        raise UserError(
            f"{path} is of a vocabulary of {rows} tokens, and the target has {target.vocab_size}."
        )
    if min(ids) < 0 or max(ids) >= rows:
        worst = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(
            f"{path} has token {worst}, which is out of range: there are {rows} tokens."
        )
    if any(a >= b for a, b in itertools.pairwise(ids)):
        raise UserError(f"{path} must have its ids in increasing order, each once.")
    missing = set(target.config.eos_ids) - set(ids)
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(map(str, sorted(missing)))}, which ends a text: a drafter that cannot "
            "propose the end drafts past it."
        )
    if not set(ids) - set(target.config.eos_ids):
        raise UserError(
            f"{path} has no token beside those that end a text: there is nothing to draft."
        )
    return np.asarray(ids, np.int32)


def narrowed(
    folder: Path,
    target: Any,
    params: Params,
    sharding: Sharding | None,
    rows: int | None = None,
) -> Params:
    """A drafter's parameters as its folder's draft vocabulary has them; on a mesh the head is then on every device.

    Args:
      rows: of its own vocabulary, where that is not padded as the target's is.
    """
    ids = read_draft_vocabulary(folder, target)
    if ids is None:
        return params
    cut = narrow(params, ids if rows is None else ids[ids < rows])
    if sharding is None:
        return cut
    new = {name: cut[name] for name in cut if cut[name] is not params.get(name)}
    return {**cut, **jax.device_put(new, sharding.whole(new))}
