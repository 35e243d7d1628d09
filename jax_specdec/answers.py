"""Answers from what a decoder's programs leave behind."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.stats import FAILED, FINISH_REASONS
from jax_specdec.errors import RunError
from jax_specdec.generation import Generation, Request, Stats, near_tie
from jax_specdec.text.detokenize import TextStream
from jax_specdec.text.token_bytes import TokenBytes


def names_of(source: np.ndarray, sources: Sequence[str]) -> list[str | None]:
    """Source numbers as names, None for the target's own, which is 0."""
    names = (None, *sources)
    return [names[i] for i in source.tolist()]


def answer_of(
    request: Request,
    host: Any,
    row: int,
    times: tuple[float, float, float],
    loop: DecodeLoop,
    spelling: TokenBytes | None,
    dtype: Any,
) -> Generation:
    """The answer in a row of a batch.

    Args:
      host: text, lengths, prompt lengths and `core.stats.Stats`, as numpy.
      times: seconds of the batch, of its prefill, and of compilation before it.
      loop: that decoded. spelling: of the tokenizer. dtype: of the target.

    Raises:
      RunError: the target's scores were not finite.
    """
    tokens, length, prompt_length, stats = host
    wall, prefill, compiling = times
    if stats.finish[row] == FAILED:
        raise RunError(
            f"Prompt {request.id}: after {length[row] - prompt_length[row]} tokens the target's scores were "
            "not finite, or every token was forbidden. A checkpoint in float16 may overflow: try bfloat16 or "
            "float32."
        )
    span = slice(int(prompt_length[row]), int(length[row]))
    ids = tokens[row, span].tolist()
    texts: list[str] = []
    if spelling is not None and ids:
        stream = TextStream(spelling, request.stop, tokens[row, : span.start].tolist())
        texts = [stream.push([token]) for token in ids]
        texts[-1] += stream.finish()
    rounds, sources = int(stats.rounds[row]), loop.sources
    drafted, accepted = int(stats.drafted[row].sum()), int(stats.accepted[row].sum())
    per_drafter = {
        source: {
            "calls": int(stats.calls[row, i]),
            "drafted": int(stats.drafted[row, i]),
            "accepted": int(stats.accepted[row, i]),
        }
        for i, source in enumerate(sources, 1)
    }
    logprobs = None if stats.logprobs is None else stats.logprobs[row, span].tolist()
    margins, near_ties = None, None
    if stats.margins is not None:
        margins = stats.margins[row, span].tolist()
        near_ties = sum(m < near_tie(dtype) for m in margins)
    return Generation(
        id=request.id,
        prompt=request.prompt,
        text="".join(texts),
        token_ids=ids,
        finish_reason=FINISH_REASONS[int(stats.finish[row])],  # type: ignore[arg-type]
        stats=Stats(
            num_tokens=len(ids),
            num_spec_steps=rounds,
            num_draft_tokens=drafted,
            num_accepted_tokens=accepted,
            draft_acceptance_rate=accepted / drafted if drafted else 0.0,
            mean_acceptance_length=len(ids) / rounds if rounds else 0.0,
            accepted_per_pos=stats.accepted_per_pos[row].tolist(),
            per_drafter=per_drafter,
            wall_time_s=wall,
            prefill_time_s=prefill,
            compile_time_s=compiling,
            tokens_per_second=len(ids) / wall if wall else 0.0,
            near_ties=near_ties,
            steps_per_width=dict(
                zip(loop.widths or (loop.nodes,), stats.widths[row].tolist(), strict=True)
            ),
            steps_per_depth=stats.depths[row].tolist(),
        ),
        logprobs=logprobs,
        margins=margins,
        sources=names_of(stats.source[row, span], sources),
        token_texts=texts,
    )
