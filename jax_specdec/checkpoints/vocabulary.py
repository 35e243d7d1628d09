"""Whether a drafter's token ids mean what the target's mean."""

from jax_specdec.checkpoints.targets import Target
from jax_specdec.errors import UserError


def check_vocabulary(target: Target, drafter: Target) -> None:
    """Refuses a drafter whose token ids do not mean what the target's mean.

    Raises:
      UserError: another vocabulary size, or tokenizers that disagree, with the share that agrees.
    """
    if target.vocab_size != drafter.vocab_size:
        raise UserError(
            f"The drafter's vocabulary has {drafter.vocab_size} entries and the target's "
            f"{target.vocab_size}: a drafter must share the target's tokenizer."
        )
    if target.tokenizer is None or drafter.tokenizer is None:
        return
    ours, theirs = target.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()
    same = sum(theirs.get(token) == index for token, index in ours.items())
    if same < len(ours) or len(theirs) != len(ours):
        raise UserError(
            f"The drafter's tokenizer agrees with the target's on {same} of {len(ours)} tokens: a drafter "
            "must share the target's tokenizer."
        )
