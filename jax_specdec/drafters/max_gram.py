"""`max-gram`: copy what followed the longest earlier occurrence of the text's end."""

import dataclasses

import jax.numpy as jnp

from jax_specdec.core.draft import chain
from jax_specdec.core.drafter import StatelessDrafter, chain_info
from jax_specdec.drafters import registry
from jax_specdec.drafters.bigram import successors
from jax_specdec.drafters.ngram import Ties, copied, longest_suffix_match


@dataclasses.dataclass(frozen=True)
class MaxGram(StatelessDrafter):
    """Max-Gram (arXiv 2312.11462, section 3 and appendix A), in a clean form.

    The haystack is the text itself, matches end before its last token, the copy extends itself past
    the end of the text (so a period is continued), and exactly `length` tokens come out of a match.

    Attributes:
      ties: among equally long matches, the earliest (the paper's code) or the latest.
      min_match: matches of fewer tokens do not count.
      fill: name of a bigram table in the parameters that drafts where nothing matched, or None to
        draft nothing there.
    """

    length: int
    name: str = "max-gram"
    ties: Ties = "latest"
    min_match: int = 1
    max_match: int | None = None
    fill: str | None = None

    @property
    def info(self):
        sizes = KIND.sizes(self.length) if self.fill is None else (self.length,)
        chances = "before" if self.fill is None else None
        return chain_info(self.name, self.length, sizes, chances=chances)

    def _match(self, text):
        return longest_suffix_match(
            text, min_match=self.min_match, max_match=self.max_match, ties=self.ties
        )

    def chances(self, text):
        """See `core.drafter.foreseen`."""
        return copied(self._match(text)[0], self.length)

    def draft(self, params, states, ctx):
        text = ctx.text
        match, end = self._match(text)
        step = jnp.arange(self.length, dtype=jnp.int32)[None]
        # The copy runs into itself after `period` tokens, where it has written what it would read.
        period = jnp.maximum(text.length - 1 - end, 1)[:, None]
        source = jnp.minimum(end[:, None] + 1 + step % period, text.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(text.tokens, source, axis=1)
        found = (match > 0)[:, None]
        if self.fill is not None:
            tokens = jnp.where(
                found, tokens, successors(params[self.fill], text.root(), self.length)
            )
            found = jnp.ones_like(found)
        return chain(text, tokens, valid=jnp.broadcast_to(found, tokens.shape)), states


KIND = registry.register(
    registry.Kind(
        "max-gram",
        lambda request: MaxGram,
        usual_length=6,
        matches=True,
        sizes=lambda length: (0, length),
    )
)
