"""The whole decoding as one pure function, for other people's programs."""

from typing import Any

import jax.numpy as jnp
from jax import export

from jax_specdec._types import Array, Int, Params
from jax_specdec.core.acceptance import MATCH, Acceptance
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.draft import Text
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.processors import Processing, Processor
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.stats import Stats
from jax_specdec.errors import UserError, a_kind


def make_generate(
    target: Any,
    drafter: Any = None,
    *,
    max_new_tokens: int,
    rule: Acceptance = MATCH,
    processors: tuple[Processor, ...] = (),
    logprobs: bool = False,
    margins: bool = False,
    costs: RoundCosts | None = None,
):
    """The whole decoding as one pure function, for other people's programs.

    Args:
      target: a `Model`, or anything with a `decoder` (a loaded target). drafter: a `Drafter`, or
        anything with a `drafter` (a loaded one); None decodes plainly.
      max_new_tokens: static, the most tokens that a row emits; its sampling may set a lower limit.
      rule, processors, logprobs, margins: as in `DecodeLoop`.
      costs: of rounds of the usual widths, a part of the function: each round drafts as deep and verifies as
        wide as pays. None: each drafts and verifies all that the drafter can.

    Returns:
      `generate(params, tokens int32[B, Lp], lengths int32[B], sampling, request_ids int32[B]) ->
      (Text, Stats)` with `params = {"target": ..., "drafters": {name: ...}}`: jit it, shard it,
      AOT-compile it or `jax.export` it (which needs the package flatbuffers). `Text.tokens` is `int32[B, Lp + max_new_tokens]`, 0 behind the
      length of each row, and so are the per-token records of `Stats`.
    """
    loop = DecodeLoop(
        getattr(target, "decoder", target),
        NoDrafter() if drafter is None else getattr(drafter, "drafter", drafter),
        rule,
        tuple(processors),
        logprobs,
        margins,
    )
    if costs is not None:
        if not isinstance(costs, RoundCosts):
            raise UserError(f"costs are `RoundCosts` or None, not {a_kind(costs)}.")
        loop = loop.budgeted()
        costs = loop.check_costs(costs)

    def generate(
        params: Params,
        tokens: Int[Array, "B Lp"],
        lengths: Int[Array, " B"],
        sampling: Sampling,
        request_ids: Int[Array, " B"],
    ) -> tuple[Text, Stats]:
        capacity = tokens.shape[1] + max_new_tokens
        most = jnp.minimum(sampling.max_new_tokens, max_new_tokens)
        sampling = sampling.replace(max_new_tokens=most)
        rows = (tokens, lengths, sampling, request_ids)
        state = loop.start(params, *rows, capacity=capacity, costs=costs)
        state = loop.run(params, state, capacity)
        inside = jnp.arange(capacity, dtype=jnp.int32)[None] < state.text.length[:, None]

        def kept(record: Array | None) -> Array | None:  # not what was drafted behind the text
            return None if record is None else jnp.where(inside, record[:, :capacity], 0)

        stats = state.stats
        stats = stats.replace(
            source=kept(stats.source),
            logprobs=kept(stats.logprobs),
            margins=kept(stats.margins),
        )
        return Text(kept(state.text.tokens), state.text.length), stats  # type: ignore[arg-type]

    return generate


# An exported `generate` is serialised with the types of its arguments and results.
for _type in (Sampling, Processing, Text, Stats):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=f"jax_specdec.{_type.__name__}",
        serialize_auxdata=lambda aux: b"",
        deserialize_auxdata=lambda data: (),
    )
