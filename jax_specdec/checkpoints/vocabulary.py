"""Whether a drafter's token ids mean what the target's mean."""

from typing import Any

from jax_specdec.errors import UserError


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
