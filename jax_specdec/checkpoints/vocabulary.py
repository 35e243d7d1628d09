"""Whether a drafter's token ids mean what the target's mean, and which ids mean the same where they do not."""

import re
from typing import Any, NamedTuple

import numpy as np

from jax_specdec.errors import UserError
from jax_specdec.text.token_bytes import id_bound, token_bytes

# Below it a drafter can hardly pay: measured elsewhere, 61 % of the drafted tokens were accepted where both
# tokenizers have 99.8 % of the tokens, and 25 % where they have 80 %.
PAYS = 0.9
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Shared(NamedTuple):
    """Two tokenizers' common tokens: those of the same bytes, special ones of the same name or use.

    Attributes:
      ids: `int32[V]`, the drafter's token that stands for each of the target's; for one that it lacks the
        last of those that spell it.
      shared: `bool[V]`, whether that is the same token.
      tokens: how many the target has.
    """

    ids: np.ndarray
    shared: np.ndarray
    tokens: int

    def sentence(self, name: str) -> str:
        """What to tell of a drafter `name`."""
        count = int(self.shared.sum())
        share = count / self.tokens
        text = (
            f"The drafter {name!r} has another tokenizer: it can draft {count:,} of the target's "
            f"{self.tokens:,} tokens ({share:.1%})"
        )
        return f"{text}." if share >= PAYS else f"{text}, with so few of which it can hardly pay."


def check_vocabulary(tokenizer: Any, rows: int, drafter: Any, drafter_rows: int) -> None:
    """Refuses a drafter whose token ids do not mean what the target's mean.

    Rows of logits are no measure: they are padded, to 152,064 of 151,936 for instance, and either tokenizer
    may have tokens added behind the vocabulary that they share.

    Args:
      tokenizer, rows: the target's, of transformers, and its rows of logits. A model without a
        tokenizer, None, must have as many rows as the other.

    Raises:
      UserError: tokenizers that disagree, with the share that agrees.
    """
    if tokenizer is None or drafter is None:
        if rows != drafter_rows:
            raise UserError(
                f"The drafter's vocabulary has {drafter_rows} entries and the target's {rows}, and without "
                "tokenizers nothing tells that they mean the same."
            )
        return
    ours, theirs = tokenizer.get_vocab(), drafter.get_vocab()
    added = {*tokenizer.get_added_vocab(), *drafter.get_added_vocab()}
    shared = ours.keys() & theirs.keys()
    same = sum(ours[token] == theirs[token] for token in shared)
    named = {index: token for token, index in ours.items()}
    clash = any(named.get(index, token) != token for token, index in theirs.items())
    if same == len(shared) and not clash and (ours.keys() ^ theirs.keys()) <= added:
        return
    sizes = f"'s vocabulary has {drafter_rows} entries and the target's {rows}, and its tokenizer"
    raise UserError(
        f"The drafter{sizes if rows != drafter_rows else chr(39) + 's tokenizer'} agrees with the target's on "
        f"{same} of {max(len(ours), len(theirs))} tokens: a drafter must share the target's tokenizer."
    )


def match_vocabulary(tokenizer: Any, rows: int, drafter: Any, drafter_rows: int) -> Shared | None:
    """None where ids mean the same; which do for another tokenizer altogether.

    Raises:
      UserError: nothing in common; or one tokenizer with some ids exchanged, which is a mistake and no other one.
    """
    try:
        check_vocabulary(tokenizer, rows, drafter, drafter_rows)
    except UserError:
        if tokenizer is None or drafter is None or _exchanged(tokenizer, drafter):
            raise
        found = share(tokenizer, rows, drafter, drafter_rows)
        if not found.shared.any():
            raise UserError(
                "The drafter's tokenizer has no token in common with the target's, so that it can draft nothing."
            ) from None
        return found
    return None


def _exchanged(tokenizer: Any, drafter: Any) -> bool:
    ours, theirs = tokenizer.get_vocab(), drafter.get_vocab()
    added = {*tokenizer.get_added_vocab(), *drafter.get_added_vocab()}
    both = (ours.keys() & theirs.keys()) - added
    moved = sum(ours[token] != theirs[token] for token in both)
    return 0 < 2 * moved < len(both)


def share(tokenizer: Any, rows: int, drafter: Any, drafter_rows: int) -> Shared:
    """The common tokens of two tokenizers of transformers whose models have so many rows of logits."""
    ours, theirs = _keys(tokenizer, rows), _keys(drafter, drafter_rows)
    ids, shared = np.zeros(rows, np.int32), np.zeros(rows, bool)
    missing: list[tuple[int, str]] = []
    for key, index in ours.items():
        if key in theirs:
            ids[index], shared[index] = theirs[key], True
        elif isinstance(key, bytes):
            missing.append((index, key.decode(errors="replace")))
    for use in ("eos_token_id", "bos_token_id"):
        one, other = getattr(tokenizer, use), getattr(drafter, use)
        if None in (one, other) or one >= rows or other >= drafter_rows:
            continue
        if not shared[one] and other not in ids[shared]:
            ids[one], shared[one] = other, True
    texts = [text for _, text in missing]
    spelled = drafter.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for (index, _), encoding in zip(missing, spelled, strict=True):
        known = [i for i in encoding.ids[-1:] if i < drafter_rows]
        ids[index] = known[0] if known else 0
    return Shared(ids, shared, len(ours))


def _keys(tokenizer: Any, rows: int) -> dict[bytes | str, int]:
    """What makes a token the same in two tokenizers: its bytes, or of a special one its name."""
    count = min(rows, id_bound(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    special = set(tokenizer.all_special_ids)
    out: dict[bytes | str, int] = {}
    for index, (name, piece) in enumerate(zip(names, token_bytes(tokenizer, count), strict=True)):
        if name is None:
            continue
        if index in special or not piece:
            out.setdefault(name, index)
        elif piece not in out or _BYTE.fullmatch(names[out[piece]]):
            out[piece] = index  # of a byte and the letter that it is, the letter
    return out
