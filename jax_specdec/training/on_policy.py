"""Text that a drafter writes itself: the on-policy data of DistillSpec (Zhou et al., arXiv 2310.08461)."""

from jax_specdec.core.acceptance import Unverified
from jax_specdec.core.drafter import Drafter, Verifier
from jax_specdec.errors import UserError


def unverified(drafter: Drafter) -> Unverified:
    """The rule under which a loop's text is what the drafter proposes, draft after draft.

    The i-th token of each block is predicted at delay i, as it is in decoding where the tokens before it
    are accepted. For a drafter that sees nothing of the target this is its own plain decoding.

    Raises:
      UserError: a drafter that is not a neural one, or an expansion.
    """
    if not isinstance(drafter, Verifier):
        raise UserError(
            f"The drafter {drafter.info.name!r} cannot write text: lm and glide can, without an expansion."
        )
    return Unverified()
