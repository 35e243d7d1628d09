"""What decoding a prompt gives: the answer, its statistics, and news while it runs."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one prompt took. Names as in vLLM where it has them.

    Attributes:
      num_tokens: emitted. num_spec_steps: target forwards (rounds) while the row was running.
      num_draft_tokens, num_accepted_tokens: drafted and accepted tokens, without the target's own.
      draft_acceptance_rate: accepted / drafted, 0 where nothing was drafted.
      mean_acceptance_length: tokens per round, the target's own token included (tau).
      accepted_per_pos: how often the draft's token at each position was accepted.
      per_drafter: by proposer, `calls` (rounds it drafted in), `drafted` and `accepted`.
      wall_time_s: prefill to the last token of the row's batch, compilation apart.
      near_ties: emitted tokens whose score beat the second best by less than 1e-3.
    """

    num_tokens: int
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_acceptance_rate: float
    mean_acceptance_length: float
    accepted_per_pos: list[int]
    per_drafter: dict[str, dict[str, int]]
    wall_time_s: float
    prefill_time_s: float
    compile_time_s: float
    tokens_per_second: float
    near_ties: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's answer.

    Attributes:
      token_ids: emitted tokens, the one that stopped the row included.
      text: what the tokens add to the prompt's text, without special tokens, cut before a stop string.
      logprobs: the target's log-probability of each emitted token (nats, before temperature and
        filters). margins: by how much each token's score beat the second best.
      origins: proposer of each token, None for the target's own.
    """

    id: Any
    prompt: str | list[int]
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    stats: Stats
    logprobs: list[float]
    margins: list[float]
    origins: list[str | None]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """News of a running row: the tokens since the last chunk and their proposers."""

    row: int
    token_ids: list[int]
    origins: list[str | None]
