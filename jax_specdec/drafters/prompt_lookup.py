"""`prompt-lookup`: copy what followed an earlier occurrence of the last few tokens."""

import dataclasses

import jax.numpy as jnp

from jax_specdec.core.draft import chain
from jax_specdec.core.drafter import StatelessDrafter, chain_info
from jax_specdec.drafters import registry
from jax_specdec.drafters.ngram import copied, longest_suffix_match


@dataclasses.dataclass(frozen=True)
class PromptLookup(StatelessDrafter):
    """Prompt-lookup decoding (Saxena, 2023), as transformers' `prompt_lookup_num_tokens`.

    The longest n-gram of at most `max_ngram` tokens decides, the earliest occurrence wins, and the copy
    ends with the text.
    """

    length: int
    name: str = "prompt-lookup"
    max_ngram: int = 3
    min_ngram: int = 1

    @property
    def info(self):
        return chain_info(self.name, self.length, KIND.sizes(self.length), chances="before")

    def _match(self, text):
        return longest_suffix_match(
            text, min_match=self.min_ngram, max_match=self.max_ngram, ties="earliest"
        )

    def chances(self, text):
        """See `core.drafter.foreseen`; tokens behind the text's end are not proposed."""
        match, end = self._match(text)
        there = self._source(end) < text.length[:, None]
        return jnp.where(there, copied(match, self.length), 0)

    def _source(self, end):
        return end[:, None] + 1 + jnp.arange(self.length, dtype=jnp.int32)[None]

    def draft(self, params, states, ctx):
        del params
        text = ctx.text
        match, end = self._match(text)
        source = self._source(end)
        valid = (match > 0)[:, None] & (source < text.length[:, None])
        source = jnp.minimum(source, text.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(text.tokens, source, axis=1)
        return chain(text, tokens, valid=valid), states


KIND = registry.register(
    registry.Kind(
        "prompt-lookup",
        lambda request: PromptLookup,
        usual_length=6,
        sizes=lambda length: tuple(range(length + 1)),
    )
)
