"""Budgets of a cascade, chosen by playing every round of greedy decoding again.

A verifier without lenience drafts what it would have drafted alone. So its own chains from every place of
a text, recorded once, tell what any cascade of it and Max-Gram drafts there, how often each of them is
called and what the target accepts: no cascade has to be compiled to be judged.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_specdec.specs.language import CASCADE, Spec
from jax_specdec.specs.sizes import depth_of
from jax_specdec.tuning.replay import Record

STATISTICAL = "max-gram"
# Budgets of a verifier or drafter, tokens proposed to a verifier, and behind what it drafted.
BUDGETS = range(1, 9)
PROPOSED = (2, 4, 6)
BEHIND = (2, 4)


class Played(NamedTuple):
    """What became of a cascade on known texts, means over rounds.

    Attributes:
      tau: tokens a round, the target's own included; of a batch, rounds of plain decoding a round of its own.
      calls: of each drafter by its place in the cascade, from the left: drafts of one that drafts alone,
        verifications of one that verifies; of a batch, as many as its slowest row needs.
    """

    tau: float
    calls: tuple[float, ...]


def candidates(
    neural: Sequence[str],
    deepest: int,
    budgets: Iterable[int] = BUDGETS,
    proposed: Iterable[int] = PROPOSED,
    behind: Iterable[int] = BEHIND,
    longest: Mapping[str, int] | None = None,
) -> Iterator[Spec]:
    """Cascades of one neural drafter and Max-Gram that draft at most `deepest` tokens.

    Vertical, horizontal and both; drafts are cut to the budgets, since every verification is as wide as
    the longest.

    Args:
      longest: by name, how many tokens behind the text a drafter may verify, its own next one included.
    """
    longest = longest or {}
    tails = [(), *((Spec(STATISTICAL, length),) for length in behind)]
    inners = [(), *((Spec(STATISTICAL, length),) for length in proposed)]
    for name, budget, tail, inner in itertools.product(neural, budgets, tails, inners):
        spec = Spec(CASCADE, inner=(Spec(name, budget, inner=inner), *tail), cut=True)
        verified = 1 + sum(part.length or 0 for part in inner)
        if inner and verified > longest.get(name, verified):
            continue
        if (inner or tail) and depth_of(spec) <= deepest:
            yield spec


def play(
    spec: Spec, texts: Sequence[Sequence[int]], found: Mapping[str, Record], batch: int = 1
) -> Played:
    """Plays every round of a cascade of `candidates`.

    Args:
      texts: prompts with answers. found: by name, `replay.record(..., everywhere=True)` of each neural
        drafter on them, with chains at least as long as the cascade's drafts. batch: texts at a time.
    """
    part, *rest = spec.inner
    record = found[part.name]
    tokens: list[int] = []
    # Of the first drafter, by row and round; others are called once a round.
    calls: list[list[int]] = []
    for row, text in enumerate(texts):
        mine = np.flatnonzero(record.row == row)
        chains = dict(zip(record.length[mine].tolist(), record.tokens[mine].tolist(), strict=True))
        begin = at = min(chains)
        calls.append([])
        while at < len(text):
            prefix, own = list(text[:at]), chains[at]
            draft, made = _first(part, prefix, own)
            calls[-1].append(made)
            for other in rest:
                draft += max_gram(prefix + draft, other.length or 0)
            at = min(at + _agreed(draft, text[at:]) + 1, len(text))
        tokens.append(at - begin)
    plain = sum(max(tokens[i : i + batch]) for i in range(0, len(tokens), batch))
    together = [
        max(made)
        for i in range(0, len(calls), batch)
        for made in itertools.zip_longest(*calls[i : i + batch], fillvalue=0)
    ]
    return Played(plain / len(together), (sum(together) / len(together), *[1.0] * len(rest)))


def _first(part: Spec, prefix: list[int], own: list[int]) -> tuple[list[int], int]:
    """What the neural drafter drafts for its budget, and in how many calls."""
    budget = part.length or 1
    if not part.inner:
        return own[:budget], 1
    done = made = 0
    while done < budget:
        proposed = max_gram(prefix + own[:done], part.inner[0].length or 0)
        done, made = done + _agreed(proposed, own[done:]) + 1, made + 1
    return own[: min(done, budget)], made


def _agreed(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of a draft the text begins with."""
    same = (mine == other for mine, other in zip(draft, text, strict=False))
    return sum(itertools.takewhile(bool, same))


def max_gram(text: Sequence[int], length: int) -> list[int]:
    """What `drafters.max_gram.MaxGram` drafts behind a text: nothing where no token of its end recurs."""
    tokens = np.asarray(text)
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    if not len(ends):
        return []
    back = 1
    while len(ends) > 1:
        longer = ends[ends >= back]
        longer = longer[tokens[longer - back] == tokens[-1 - back]]
        if not len(longer):
            break
        ends, back = longer, back + 1
    out = list(text)
    for place in range(int(ends[-1]) + 1, int(ends[-1]) + 1 + length):
        out.append(out[place])
    return out[len(text) :]
