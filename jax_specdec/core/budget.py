"""How deep to draft and how wide to verify: a budget for every round, from measured costs and what was accepted.

A round that drafts D tokens a row and verifies T nodes a row takes `draft[D] + verify[T]` seconds and emits
`1 + A_1 + ... + A_D` tokens in each row, A_i being the chance that the first i drafted tokens are accepted.
`Budget.plan` chooses D before anything is drafted, 0 included, and `Budget.width` the verified nodes once the
draft is known, for most tokens per second (arXiv 2211.17192, section 3.3, with measured costs in place
of constants and the row's own acceptance in place of a mean).

Most drafters say of each token how likely it is to be right (`Info.chances`): a model by its confidence, a copy by how
long a match it continues. Then what is remembered is by how much they understate that (`believed`), no more of a draft is
verified than pays, and a model is asked or not, its draft ending where going on would not pay (`Thrift`).

All rows of a batch share a round, and so its depth and width; their acceptance is estimated row by row. A batch has
ended when its last row has: what a row gains that is ahead of the others is worth little (`worth`), unless ended rows
are replaced.

A drafter that is made of drafters may draft in several ways (`drafter.ways_of`), with all of them or with some: each
has its own costs and its own acceptance, and `plan` chooses among them, too.

Nothing here changes a text: it decides what is drafted and verified, never what is accepted.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.sharding import Sharding
from jax_specdec.errors import UserError

# Each observation of a position counts this much of the one after it: the last two dozen decide.
_MEMORY = 0.96
# A row begins as if so many drafts had been seen, of which this share was accepted: hopeful, so that a drafter is asked
# at once wherever it may pay, and quickly convinced of the contrary. Verification costs more than asking and is not
# needed to learn whether a first token is right: there the beginning is sober. One row's text may well be an easy one,
# but the mean of N rows that count alike is hardly that far from the usual: what hope is above it shrinks as their
# deviation does, by the root of N.
_PRIOR_WEIGHT, _SOBER, _HOPE = 4.0, 0.5, 0.3
# By how much a drafter understates its chances, in logits, before anything was seen: a model by 1, since the best token of its
# distribution is the target's best more often than the target would draw it, a copy by nothing; and how well that is known.
_UNDERSTATED, _PRIOR_KNOWN, _MOST_SHIFT = 1.0, 1.0, 6.0
# No drafter is surer than that.
_SURE = 1e-3
# How many drafts it counts for what is hoped of a model: little, since each draft costs little and says much.
_PRIOR_ASKED = 0.5
# Of a token that nobody has drafted yet, how likely it is to be right, before anything was seen.
_FURTHER = 0.5
# No chance is below this: sums of them stay apart in float32, so that at equal costs deeper is better.
_LEAST = 1e-3
# While drafting does not pay, asking again, in whichever way, may take this share of plain decoding's time. After a token
# that was right the next probe comes sooner by `_SOONER` of the rounds between; the first probes of a drafter that costs
# a plain round come `_DEAR` times as late as those of one that costs nothing.
_PROBING, _SOONER, _DEAR = 0.0125, 0.9, 8.0
# A batch asks when so much of it is due: where ended rows are replaced, and where all wait for the last.
_DUE = (0.5, 0.75)
_RAREST_PROBE = 64
# What a round takes beyond a plain one counts so often, of one row and of ever more: the policy takes what looks best,
# what looks best is overrated, and the sum over rows more so, since a batch waits for the last of them.
_MARGIN = (1.05, 1.25)
# A row so many tokens ahead of the last one counts 1/e of it, and none less than a hundredth.
_AHEAD, _LEAST_WORTH = 1.5, 0.01
FREE = -1


class RoundCosts(flax.struct.PyTreeNode):
    """Seconds of the parts of a round, or any other unit, of one batch size.

    Attributes:
      verify: `float32[K]`, of a verification of each of the loop's widths.
      draft: `float32[N, P + 1]`, of drafting 0, 1, ..., P tokens in every row, in each of the drafter's N
        ways (most drafters have one). `draft[:, 0]` is 0, and what a way cannot do is infinite.
    """

    verify: Float[Array, " K"]
    draft: Float[Array, "N D"]

    @classmethod
    def unknown(
        cls, widths: int, ways: int, depth: int, alternatives: Sequence[int] = ()
    ) -> "RoundCosts":
        """As if all rounds took as long: each drafts all that it can, and is as wide as what was drafted.

        Args:
          alternatives: the depth of each way, where none has more drafters than another; otherwise the first
            way has all of them, and is taken.
        """
        draft = np.zeros((ways, depth + 1), np.float32)
        for way, most in enumerate(alternatives or (depth, *[0] * (ways - 1))):
            draft[way, most + 1 :] = np.inf
        return cls(jnp.ones((widths,), jnp.float32), jnp.asarray(draft))

    def as_arrays(self) -> "RoundCosts":
        """The same of a user's numbers; raises `UserError` where they are none."""
        if hasattr(self.verify, "shape") and hasattr(self.draft, "shape"):
            return self
        try:
            return RoundCosts(*(jnp.asarray(x, jnp.float32) for x in (self.verify, self.draft)))
        except (TypeError, ValueError):
            raise UserError(
                "The costs of a round are arrays of numbers: see `RoundCosts`."
            ) from None

    def check(self, widths: int, ways: int, depth: int) -> None:
        """Raises `UserError` unless these are the costs of such a loop, as far as they are known."""
        wanted, got = ((widths,), (ways, depth + 1)), (self.verify.shape, self.draft.shape)
        if got != wanted:
            raise UserError(
                f"The costs of a round must have the shapes {wanted[0]} (one for each width) and {wanted[1]} "
                f"(0 to {depth} drafted tokens in each way), got {got[0]} and {got[1]}."
            )
        if isinstance(self.verify, Tracer) or isinstance(self.draft, Tracer):
            return
        verify, draft = np.asarray(self.verify), np.asarray(self.draft)
        if not (np.isfinite(verify).all() and (verify > 0).all() and (draft >= 0).all()):
            raise UserError(
                "The costs of a round must be above 0 and finite; of drafting, at least 0 (infinite: cannot be)."
            )
        if (np.diff(verify) < 0).any() or (draft[:, 0] != 0).any():
            raise UserError(
                "The costs of a wider round must not be less than of a narrow one, and drafting nothing costs 0."
            )


def usual_widths(nodes: int) -> tuple[int, ...]:
    """Widths for a drafter whose verification has at most `nodes` nodes, its root included.

    Fibonacci's numbers, without what is nearly the widest: each width is compiled.

    >>> usual_widths(1), usual_widths(5), usual_widths(8), usual_widths(9), usual_widths(22)
    ((1,), (1, 2, 3, 5), (1, 2, 3, 5, 8), (1, 2, 3, 5, 9), (1, 2, 3, 5, 8, 13, 22))
    """
    steps = [1, 2]
    while steps[-1] < nodes:
        steps.append(sum(steps[-2:]))
    return tuple(dict.fromkeys([*(width for width in steps if 5 * width < 4 * nodes), nodes]))


def check_widths(widths: tuple[int, ...], nodes: int) -> None:
    """Raises `UserError` unless widths rise from 1 to `nodes`."""
    rising = all(a < b for a, b in itertools.pairwise(widths))
    if not widths or not rising or widths[0] != 1 or widths[-1] != nodes:
        raise UserError(
            f"The widths of a round must rise from 1 to the draft's {nodes} nodes (root included), got "
            f"{', '.join(map(str, widths)) or 'none'}."
        )


# When a way says of its tokens how likely each is to be right: before it drafts, with the draft, or never.
Told = Literal["before", "after"] | None


def told_as(kind: Told, told: Sequence[Told], way: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a way is of this kind."""
    return jnp.asarray([one == kind for one in told])[way]


class Plan(NamedTuple):
    """What a round drafts.

    Attributes:
      way: `int32[]`, which of the drafter's ways. depth: `int32[]`, tokens in every row; 0 asks no drafter.
    """

    way: Int[Array, ""]
    depth: Int[Array, ""]


def worth(active: Bool[Array, " B"], left: Int[Array, " B"] | None = None) -> Float[Array, " B"]:
    """What a token in each row is worth, 0 in rows that have ended.

    Args:
      left: tokens that each row may still emit, where the batch has to wait for its last row. None: ended rows are
        replaced, and every token is worth the same.
    """
    if left is None:
        return active.astype(jnp.float32)
    ahead = (jnp.max(jnp.where(active, left, 0)) - left).astype(jnp.float32)
    return jnp.where(active, jnp.maximum(jnp.exp(-ahead / _AHEAD), _LEAST_WORTH), 0)


class Thrift(flax.struct.PyTreeNode):
    """Where a draft ends because drafting and verifying one more token would not pay.

    Attributes:
      worth: `float32[B]`, of a token in each row, 1 in all. shift: `float32[B]`, see `believed`.
      least: `float32[P]`, the chance that all tokens before depth i + 1 are right, from which on that one is drafted.
    """

    worth: Float[Array, " B"]
    shift: Float[Array, " B"]
    least: Float[Array, " P"]

    def further(self, reach: Float[Array, " B"], chance: Float[Array, " B"]) -> Float[Array, " B"]:
        """The chance that all tokens are right, of some and of the next one, of which the drafter says `chance`."""
        return reach * believed(chance, self.shift)

    def depth(self, chance: Float[Array, "B P"]) -> Int[Array, ""]:
        """How many tokens are drafted, by what the drafter would say of each."""
        reach = jnp.cumprod(believed(chance, self.shift[:, None]), axis=1)
        line = jnp.arange(1, reach.shape[1], dtype=jnp.int32)
        on = jnp.sum(self.worth[:, None] * reach[:, :-1], axis=0) >= self.least[line]
        return 1 + jnp.sum(jnp.cumprod(on.astype(jnp.int32)), dtype=jnp.int32)

    def goes_on(self, reach: Float[Array, " B"], depth: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a token at `depth` + 1 is drafted, behind `depth` tokens that are all right so often."""
        return (
            jnp.sum(self.worth * reach) >= self.least[jnp.minimum(depth, self.least.shape[0] - 1)]
        )


def _alone(worth: Float[Array, " B"]) -> Float[Array, ""]:
    """1 where one row counts, and by the root of N less where N rows count alike."""
    squares = jnp.maximum(jnp.sum(worth**2), jnp.finfo(jnp.float32).tiny)
    return lax.rsqrt(jnp.maximum(jnp.sum(worth) ** 2 / squares, 1))


class Budget(flax.struct.PyTreeNode):
    """What the policy remembers, and the costs that it reckons with.

    Attributes:
      costs: the same for all rows.
      hits, tries: `float32[B, N, P]`, how often the draft's token at depth i + 1 became text, and how often that
        was seen, where all before it had, by way of drafting; both forget.
      shift, known: `float32[B, N]`, by how much more each way understates its chances than was thought, in logits (`believed`),
        and how well that is known: the Fisher information of the tokens seen, which forgets.
      asked, brought, spent: `float32[B, N]`, how often the drafter was asked, the tokens beyond one that its drafts promised, and
        the rounds of plain decoding that they took beyond one; all forget.
      waited: `int32[B, N]`, rounds since the drafter was last asked in that way.
      forced: `int32[3]`, a way, a depth and the index of a width that replace the policy, for measuring;
        `FREE`.
    """

    costs: RoundCosts
    hits: Float[Array, "B N P"]
    tries: Float[Array, "B N P"]
    shift: Float[Array, "B N"]
    known: Float[Array, "B N"]
    asked: Float[Array, "B N"]
    brought: Float[Array, "B N"]
    spent: Float[Array, "B N"]
    waited: Int[Array, "B N"]
    forced: Int[Array, "3"]

    @classmethod
    def empty(cls, costs: RoundCosts, batch: int) -> "Budget":
        """Nothing observed yet."""
        ways, depths = costs.draft.shape
        by_depth = jnp.zeros((batch, ways, depths - 1), jnp.float32)
        by_way = jnp.zeros((batch, ways), jnp.float32)
        return cls(
            costs=costs,
            hits=by_depth,
            tries=by_depth,
            shift=by_way,
            known=by_way,
            asked=by_way,
            brought=by_way,
            spent=by_way,
            waited=jnp.zeros((batch, ways), jnp.int32),
            forced=jnp.full((3,), FREE, jnp.int32),
        )

    def placed(self, sharding: Sharding) -> "Budget":
        """The same where rows lie on a mesh; costs are everywhere."""
        names = ("hits", "tries", "shift", "known", "asked", "brought", "spent", "waited")
        return self.replace(**{name: sharding.rows(getattr(self, name)) for name in names})

    def force(self, *, way: int = FREE, depth: int = FREE, width: int = FREE) -> "Budget":
        """The same with parts of the policy replaced, for measuring.

        Args:
          width: the index of one.
        """
        return self.replace(forced=jnp.asarray([way, depth, width], jnp.int32))

    def acceptance(self, prior: float | Array) -> Float[Array, "B N P"]:
        """Chance that the token at each depth is accepted where all before it are, of ways that say nothing of it.

        A depth with little evidence counts as the first, and the first as `prior`.
        """
        hits, tries = self.hits, self.tries + _PRIOR_WEIGHT
        first = (hits[..., :1] + _PRIOR_WEIGHT * prior) / tries[..., :1]
        rest = (hits[..., 1:] + _PRIOR_WEIGHT * first) / tries[..., 1:]
        return jnp.concatenate([first, rest], axis=-1)

    def understated(self, told: Sequence[Told]) -> Float[Array, "B N"]:
        """By how much each way understates its chances, see `believed`."""
        thought = [_UNDERSTATED if kind == "after" else 0.0 for kind in told]
        return self.shift + jnp.asarray([thought], jnp.float32)

    def plan(
        self,
        worth: Float[Array, " B"],
        widths: tuple[int, ...],
        is_chain: bool,
        told: Sequence[Told],
        foreseen: Sequence[Float[Array, "B Q"] | None] = (),
        *,
        replaced: bool = False,
    ) -> Plan:
        """How to draft in this round.

        Where drafting does not pay it is still asked for now and then, soon after a token that was
        right, else after twice as many rounds as before until it is as seldom as `_PROBING` asks, when most of the
        batch by worth is due; and where one way pays, the others are tried every so often.

        Args:
          worth: of a token in each row, see `worth`.
          told: of each way.
          foreseen: the chances of each way that says them before, see `core.drafter.foreseen`; 0: it has no token, and the row
            emits one.
          replaced: whether ended rows are; static.
        """
        costs = self.costs
        ways, depths = costs.draft.shape
        drafts = np.arange(depths)
        # A tree of any depth may have all nodes.
        index = (
            np.searchsorted(widths, drafts + 1)
            if is_chain
            else np.minimum(drafts, 1) * (len(widths) - 1)
        )
        able = jnp.broadcast_to(worth[:, None], self.waited.shape)
        alone = _alone(worth)
        hope = _SOBER + _HOPE * alone
        expected = _tokens(self.acceptance(hope))
        shift = self.understated(told)
        for way, chance in enumerate(foreseen):
            if chance is None:
                continue
            found = chance[:, 0] > 0
            promised = _tokens(believed(chance, shift[:, way, None]))
            promised = jnp.pad(promised, ((0, 0), (0, depths - promised.shape[1])), mode="edge")
            expected = expected.at[:, way].set(jnp.where(found[:, None], promised, 1))
            able = able.at[:, way].set(jnp.where(found, able[:, way], 0))
        tokens = jnp.sum(worth[:, None, None] * expected, axis=0)
        seconds = costs.verify[index][None] + costs.draft
        rate = tokens / self._at_worst(seconds, alone)
        deepest = jnp.sum(jnp.isfinite(costs.draft), axis=1, dtype=jnp.int32) - 1
        late = [kind == "after" for kind in told]
        if any(late):
            whole = jnp.arange(depths, dtype=jnp.int32)[None] == deepest[:, None]
            by_asking = self._by_asking(worth, seconds, hope, alone)[:, None]
            by_asking = jnp.where(whole, by_asking, -jnp.inf)
            rate = jnp.where(np.asarray(late)[:, None] & (drafts > 0)[None], by_asking, rate)
        # Of equally good ones the first way, and in it the deepest.
        best = jnp.argmax(rate[:, ::-1].reshape(-1)).astype(jnp.int32)
        way, depth = best // depths, depths - 1 - best % depths
        idle, place = depth == 0, jnp.arange(ways, dtype=jnp.int32)
        first = 1 + _DEAR * costs.draft[:, 1] / costs.verify[0]
        every = jnp.minimum(self._rarest()[None], first[None] * jnp.exp2(self.asked))
        every = jnp.where(idle, every, 2 * _RAREST_PROBE)
        due = (self.waited + 1).astype(jnp.float32) >= every
        share = _DUE[0] if replaced else _DUE[1]
        due = jnp.sum(jnp.where(due, able, 0), axis=0) >= share * jnp.sum(worth)
        due = due & (idle | (place != way))
        # What would not pay if all of it were right is never asked.
        most = jnp.asarray(1 + drafts, jnp.float32)[None] / seconds
        due = due & (jnp.max(most[:, 1:], axis=1, initial=0) * costs.verify[0] > 1)
        probed = jnp.argmax(due).astype(jnp.int32)
        # One token tells enough, unless the drafter itself ends where no more pay.
        deep = jnp.where(idle, 1, 1 + jnp.argmax(rate[probed, 1:])).astype(jnp.int32)
        deep = jnp.where(told_as("after", told, probed), deepest[probed], deep)
        way, depth = jnp.where(jnp.any(due), jnp.stack([probed, deep]), jnp.stack([way, depth]))
        forced = self.forced
        return Plan(
            jnp.where(forced[0] == FREE, way, forced[0]),
            jnp.where(forced[1] == FREE, depth, forced[1]),
        )

    def _by_asking(
        self, worth: Float[Array, " B"], seconds: Float[Array, "N D"], hope: Array, alone: Array
    ) -> Float[Array, " N"]:
        """Tokens per second of rounds in which each way is asked, by what its drafts have promised so far."""
        plain = self.costs.verify[0]
        promise = _tokens(jnp.ones((1, seconds.shape[1] - 1)) * hope)
        at_worst = self._at_worst(seconds, alone)
        hoped = 1 + jnp.argmax((promise / at_worst)[:, 1:], axis=1)
        tokens = promise[0, hoped] - 1
        took = jnp.take_along_axis(seconds, hoped[:, None], axis=1)[:, 0] / plain - 1
        counts = self.asked + _PRIOR_ASKED
        tokens = (self.brought + _PRIOR_ASKED * tokens[None]) / counts
        took = jnp.maximum(self.spent + _PRIOR_ASKED * took[None], 0) / counts
        took = jnp.where(worth[:, None] > 0, took, 0)
        total = jnp.maximum(jnp.sum(worth), jnp.finfo(jnp.float32).tiny)
        took = plain * (1 + jnp.sum(worth[:, None] * took, axis=0) / total)
        return jnp.sum(worth[:, None] * (1 + tokens), axis=0) / self._at_worst(took, alone)

    def thrift(
        self, worth: Float[Array, " B"], plan: Plan, widths: tuple[int, ...], told: Sequence[Told]
    ) -> Thrift:
        """Where a draft ends that is drafted token by token, and says of each how likely it is."""
        costs = self.costs
        plain, draft = costs.verify[0], costs.draft[plan.way]
        # Verifying one more costs what a width more does on the whole: which widths there are is a matter of compiling.
        wider = (costs.verify[-1] - plain) / max(1, widths[-1] - 1)
        share = worth / jnp.maximum(jnp.sum(worth), jnp.finfo(jnp.float32).tiny)
        # How likely it is to be right is not known before it is drafted: as likely as others at its depth were.
        usually = jnp.sum(share[:, None] * self.acceptance(_FURTHER)[:, plan.way], axis=0)
        usually = jnp.maximum(usually, _LEAST)
        least = (jnp.diff(draft) + wider) / (usually * plain)
        least = jnp.where(self.forced[1] == FREE, least, -jnp.inf)
        return Thrift(share, self.understated(told)[:, plan.way], least)

    def _rarest(self) -> Float[Array, " N"]:
        """Rounds between probes of each way that nothing speaks for."""
        costs = self.costs
        # Asked for one token, it also reads what it has missed: about as much again.
        every = 2 * costs.draft.shape[0] * costs.draft[:, 1] / (_PROBING * costs.verify[0])
        return jnp.minimum(every, _RAREST_PROBE)

    def _at_worst(self, seconds: Array, alone: Array) -> Array:
        """Seconds of rounds as the policy reckons with them, see `_MARGIN`."""
        plain, (one, many) = self.costs.verify[0], _MARGIN
        return plain + (many - (many - one) * alone) * (seconds - plain)

    def width(
        self,
        worth: Float[Array, " B"],
        nodes: Int[Array, " B"],
        reached: Int[Array, " B"],
        way: Int[Array, ""],
        widths: tuple[int, ...],
        is_chain: bool,
        told: Sequence[Told],
        chance: Float[Array, "B P"],
    ) -> tuple[Int[Array, ""], Float[Array, " B"]]:
        """The index of the width at which the draft is verified, and the tokens that each row can expect of that.

        Args:
          worth: see `worth`. nodes: drafted nodes of each row. reached: the depth of the deepest. A chain may be verified in
            part; a tree as a whole or not at all.
          told: of each way. chance: of each token of the main chain, from a way that says one.
        """
        says = ~told_as(None, told, way)
        likely = believed(chance, self.understated(told)[:, way, None])
        expected = _tokens(jnp.where(says, likely, self.acceptance(_SOBER)[:, way]))
        chosen = np.asarray(widths)
        if is_chain:
            within = jnp.minimum(nodes[:, None], chosen[None] - 1)
        else:
            within = jnp.where(chosen[None] > nodes[:, None], reached[:, None], 0)
        tokens = jnp.take_along_axis(expected, within.astype(jnp.int32), axis=1)
        rate = jnp.sum(worth[:, None] * tokens, axis=0)
        rate = rate / self._at_worst(self.costs.verify, _alone(worth))
        best = jnp.argmax(rate).astype(jnp.int32)
        best = jnp.where(self.forced[2] == FREE, best, self.forced[2])
        return best, tokens[:, best]

    def observe(
        self,
        active: Bool[Array, " B"],
        proposed: Bool[Array, "B P"],
        drafted: Int[Array, "B P"],
        emitted: Int[Array, "B Q"],
        count: Int[Array, " B"],
        accepted: Int[Array, " B"],
        plan: Plan,
        index: Int[Array, ""],
        expected: Float[Array, " B"],
        told: Sequence[Told],
        chance: Float[Array, "B P"],
    ) -> "Budget":
        """The budget with one more round in it.

        A drafted token that was not verified is held against the target's own token in its place, if the
        target has said one: so a drafter that costs next to nothing is followed without being verified.

        Args:
          proposed: which depths of the main chain have a token. drafted: those tokens.
          emitted, count: what became text. accepted: drafted nodes among it, of a tree's other paths too.
          plan: of the round, as deep as was drafted. index, expected: as `width` gave them. told, chance: as it took them.
        """
        place = jnp.arange(proposed.shape[1], dtype=jnp.int32)[None]
        right = (drafted == emitted[:, :-1]) & proposed & (place < count[:, None])
        right = jnp.cumprod(right.astype(jnp.int32), axis=1).astype(bool)
        right = right | (place < accepted[:, None])
        before = jnp.pad(right[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        seen = before & proposed & (place < count[:, None]) & active[:, None]
        taken = jnp.arange(self.waited.shape[1], dtype=jnp.int32)[None] == plan.way
        seen = seen[:, None] & taken[..., None]
        right = right[:, None]
        fade = jnp.where(seen, _MEMORY, 1.0)
        # One step of Newton's towards the likeliest shift, from what was thought before.
        likely = believed(chance, self.understated(told)[:, plan.way, None])[:, None]
        missed = jnp.sum(jnp.where(seen, right.astype(jnp.float32) - likely, 0), axis=-1)
        learned = jnp.sum(jnp.where(seen, likely * (1 - likely), 0), axis=-1)
        known = jnp.where(jnp.any(seen, axis=-1), _MEMORY * self.known, self.known) + learned
        shift = self.shift + missed / (_PRIOR_KNOWN + known)
        # After a token that was right the next probe is due soon.
        again = jnp.where(right[..., 0], (_SOONER * self._rarest()[None]).astype(jnp.int32), 0)
        taken = taken & (plan.depth > 0)
        waited = jnp.where(taken, again, self.waited + 1)
        # A row for which there was nothing tells nothing.
        told_more = taken & active[:, None] & proposed[:, :1]
        costs = self.costs
        took = costs.verify[index] + costs.draft[plan.way, plan.depth]
        took = jnp.where(plan.depth > 0, took / costs.verify[0] - 1, 0)

        def remembered(old: Array, new: Array | float) -> Array:
            return jnp.where(told_more, _MEMORY * old + new, old)

        return self.replace(
            hits=self.hits * fade + (seen & right).astype(jnp.float32),
            tries=self.tries * fade + seen.astype(jnp.float32),
            shift=jnp.clip(shift, -_MOST_SHIFT, _MOST_SHIFT),
            known=known,
            asked=remembered(self.asked, 1.0),
            brought=remembered(self.brought, expected[:, None] - 1),
            spent=remembered(self.spent, took),
            waited=jnp.where(active[:, None], waited, self.waited),
        )


def believed(chance: Float[Array, "*s"], shift: Float[Array, "*#s"]) -> Float[Array, "*s"]:
    """A drafter's chances, that are said to be so many logits too small; 0 stays 0, where there is no token."""
    odds = jnp.clip(chance, _SURE, 1 - _SURE)
    return jnp.where(chance > 0, jax.nn.sigmoid(jax.scipy.special.logit(odds) + shift), 0)


def _tokens(acceptance: Float[Array, "*s P"]) -> Float[Array, "*s D"]:
    """Tokens of a round with 0, 1, ..., P drafted tokens verified, each accepted so often where all before it are."""
    reach = jnp.maximum(jnp.cumprod(acceptance, axis=-1), _LEAST)
    none = [(0, 0)] * (acceptance.ndim - 1)
    return 1 + jnp.pad(jnp.cumsum(reach, axis=-1), (*none, (1, 0)))


def select_in_place(index: Int[Array, ""], branches: Sequence, held, otherwise=None):
    """`(held, result)` of one of some branches, which take `held` and give it back changed.

    Each branch is a loop of at most one turn: XLA writes to what a loop carries in place, and copies what a
    conditional does.

    Args:
      otherwise: the result where `index` is of no branch, which leaves `held` as it is; None where there is
        no such index.
    """
    if otherwise is None:
        if len(branches) == 1:
            return branches[0](held)
        results = jax.eval_shape(branches[0], held)[1]
        otherwise = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), results)
    carry = (jnp.asarray(index, jnp.int32), held, otherwise)
    for place, branch in enumerate(branches):

        def once(carry, branch=branch):
            held, result = branch(carry[1])
            return jnp.int32(-1), held, result

        carry = lax.while_loop(lambda carry, place=place: carry[0] == place, once, carry)
    return carry[1:]
