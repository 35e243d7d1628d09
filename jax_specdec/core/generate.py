"""The whole decoding as one pure function, for other people's programs."""

from typing import Any

from jax_specdec._types import Array, Int
from jax_specdec.core import acceptance
from jax_specdec.core.draft import Text
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.processors import Processor
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.stats import Stats


def make_generate(
    target: Any,
    drafter: Any = None,
    *,
    max_new_tokens: int,
    rule: acceptance.Rule = "match",
    processors: tuple[Processor, ...] = (),
):
    """The whole decoding as one pure function, for other people's programs.

    Args:
      target: a `Decoder`, or anything with a `decoder` (a loaded target). drafter: a `Drafter`, or
        anything with a `drafter` (a loaded one); None decodes plainly.
      max_new_tokens: static; the text has room for prompt width + max_new_tokens.

    Returns:
      `generate(params, tokens int32[B, Lp], lengths int32[B], sampling, request_ids int32[B]) ->
      (Text, Stats)` with `params = {"target": ..., "drafters": {name: ...}}`: jit it, shard it,
      AOT-compile it or `jax.export` it.
    """
    from jax_specdec.drafters.none import NoDrafter

    loop = DecodeLoop(
        getattr(target, "decoder", target),
        NoDrafter() if drafter is None else getattr(drafter, "drafter", drafter),
        rule,
        tuple(processors),
    )

    def generate(
        params: dict[str, Any],
        tokens: Int[Array, "B Lp"],
        lengths: Int[Array, " B"],
        sampling: Sampling,
        request_ids: Int[Array, " B"],
    ) -> tuple[Text, Stats]:
        capacity = tokens.shape[1] + max_new_tokens
        state = loop.start(params, tokens, lengths, sampling, request_ids, capacity=capacity)
        state = loop.run(params, state, capacity)
        return state.text, state.stats

    return generate
