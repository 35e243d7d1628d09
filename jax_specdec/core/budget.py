"""How deep to draft and how wide to verify: a budget for every round, from measured costs and what was accepted.

A round that drafts D tokens a row and verifies T nodes a row takes `draft[D] + verify[T]` seconds and emits
`1 + A_1 + ... + A_D` tokens in each row, A_i being the chance that the first i drafted tokens are accepted.
`Budget.depth` chooses D before anything is drafted, 0 included, and `Budget.width` the verified nodes once the
draft is known; both maximise tokens per second (arXiv 2211.17192, section 3.3, with measured costs in place
of constants and the row's own acceptance in place of a mean). All rows of a batch share a round, and so its
depth and width; their acceptance is estimated row by row.

Nothing here changes a text: it decides what is drafted and verified, never what is accepted.
"""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.errors import UserError

# Each observation of a position counts this much of the one after it: the last dozen decide.
_MEMORY = 0.92
# A row begins as if so many drafts had been seen, of which this share was accepted.
_PRIOR_WEIGHT, _PRIOR = 2.0, 0.6
# While drafting does not pay, asking the drafter again may take this share of plain decoding's time.
_PROBING = 0.02
_RAREST_PROBE = 64.0
FREE = -1


class RoundCosts(flax.struct.PyTreeNode):
    """Seconds of the parts of a round, or any other unit.

    Attributes:
      verify: `float32[K]`, of a verification of each of the loop's widths.
      draft: `float32[P + 1]`, of drafting 0, 1, ..., P tokens in every row; `draft[0]` is 0.
    """

    verify: Float[Array, " K"]
    draft: Float[Array, " D"]


def usual_widths(nodes: int) -> tuple[int, ...]:
    """Widths for a drafter whose verification has at most `nodes` nodes, its root included.

    >>> usual_widths(1), usual_widths(8), usual_widths(22)
    ((1,), (1, 4, 8), (1, 4, 8, 16, 22))
    """
    steps = [1, *(2**i for i in range(2, nodes.bit_length()))]
    return tuple(dict.fromkeys([*(width for width in steps if width < nodes), nodes]))


def check_widths(widths: tuple[int, ...], nodes: int) -> None:
    """Raises `UserError` unless widths rise from 1 to `nodes`."""
    rising = all(a < b for a, b in itertools.pairwise(widths))
    if not widths or not rising or widths[0] != 1 or widths[-1] != nodes:
        raise UserError(
            f"The widths of a round must rise from 1 to the draft's {nodes} nodes (root included), got "
            f"{', '.join(map(str, widths)) or 'none'}."
        )


class Budget(flax.struct.PyTreeNode):
    """What the policy remembers, and the costs that it reckons with.

    Attributes:
      costs: the same for all rows.
      hits, tries: `float32[B, P]`, how often the draft's token at depth i + 1 became text, and how often that
        was seen, where all before it had; both forget.
      waited: `int32[B]`, rounds since the drafter was last asked.
      forced: `int32[2]`, a depth and the index of a width that replace the policy, for measuring; `FREE`.
      rounds: `int32[B, K]`, rounds of each row by width. undrafted: `int32[B]`, those without a draft.
    """

    costs: RoundCosts
    hits: Float[Array, "B P"]
    tries: Float[Array, "B P"]
    waited: Int[Array, " B"]
    forced: Int[Array, "2"]
    rounds: Int[Array, "B K"]
    undrafted: Int[Array, " B"]

    @classmethod
    def empty(cls, costs: RoundCosts, batch: int) -> "Budget":
        """Nothing observed yet."""
        none = jnp.zeros((batch, costs.draft.shape[0] - 1), jnp.float32)
        return cls(
            costs=costs,
            hits=none,
            tries=none,
            waited=jnp.zeros((batch,), jnp.int32),
            forced=jnp.full((2,), FREE, jnp.int32),
            rounds=jnp.zeros((batch, costs.verify.shape[0]), jnp.int32),
            undrafted=jnp.zeros((batch,), jnp.int32),
        )

    def acceptance(self) -> Float[Array, "B P"]:
        """Chance that the token at each depth is accepted where all before it are.

        A depth with little evidence counts as the first, and the first as `_PRIOR`.
        """
        first = (self.hits[:, :1] + _PRIOR_WEIGHT * _PRIOR) / (self.tries[:, :1] + _PRIOR_WEIGHT)
        rest = (self.hits[:, 1:] + _PRIOR_WEIGHT * first) / (self.tries[:, 1:] + _PRIOR_WEIGHT)
        return jnp.concatenate([first, rest], axis=1)

    def expected(self) -> Float[Array, "B D"]:
        """Tokens that a round emits in each row with 0, 1, ..., P drafted tokens verified."""
        reach = jnp.cumprod(self.acceptance(), axis=1)
        return 1 + jnp.pad(jnp.cumsum(reach, axis=1), ((0, 0), (1, 0)))

    def depth(
        self, active: Bool[Array, " B"], widths: tuple[int, ...], is_chain: bool
    ) -> Int[Array, ""]:
        """Tokens to draft in every row; 0 where the drafter is not to be asked.

        Where drafting does not pay it is still asked for one token now and then, at once after one that was
        right, as often as `_PROBING` allows.
        """
        costs = self.costs
        drafts = np.arange(costs.draft.shape[0])
        # A tree of any depth may have all nodes.
        index = (
            np.searchsorted(widths, drafts + 1)
            if is_chain
            else np.minimum(drafts, 1) * (len(widths) - 1)
        )
        tokens = jnp.sum(jnp.where(active[:, None], self.expected(), 0), axis=0)
        rate = tokens / (costs.verify[index] + costs.draft)
        best = jnp.argmax(rate).astype(jnp.int32)
        # Asked for one, it also reads what it has missed: about as much again.
        every = 2 * costs.draft[1] / (_PROBING * costs.verify[0])
        due = self.waited.astype(jnp.float32) + 1 >= jnp.minimum(every, _RAREST_PROBE)
        best = jnp.where((best == 0) & jnp.any(active & due), 1, best)
        return jnp.where(self.forced[0] == FREE, best, self.forced[0])

    def width(
        self,
        active: Bool[Array, " B"],
        nodes: Int[Array, " B"],
        reached: Int[Array, " B"],
        widths: tuple[int, ...],
        is_chain: bool,
    ) -> Int[Array, ""]:
        """The index of the width at which the draft is verified.

        Args:
          nodes: drafted nodes of each row. reached: the depth of the deepest. A chain may be verified in
            part; a tree as a whole or not at all.
        """
        expected, chosen = self.expected(), np.asarray(widths)
        if is_chain:
            within = jnp.minimum(nodes[:, None], chosen[None] - 1)
        else:
            within = jnp.where(chosen[None] > nodes[:, None], reached[:, None], 0)
        tokens = jnp.take_along_axis(expected, within.astype(jnp.int32), axis=1)
        rate = jnp.sum(jnp.where(active[:, None], tokens, 0), axis=0) / self.costs.verify
        best = jnp.argmax(rate).astype(jnp.int32)
        return jnp.where(self.forced[1] == FREE, best, self.forced[1])

    def observe(
        self,
        active: Bool[Array, " B"],
        proposed: Bool[Array, "B P"],
        drafted: Int[Array, "B P"],
        emitted: Int[Array, "B Q"],
        count: Int[Array, " B"],
        accepted: Int[Array, " B"],
        depth: Int[Array, ""],
        width: Int[Array, ""],
    ) -> "Budget":
        """The budget with one more round in it.

        A drafted token that was not verified is held against the target's own token in its place, if the
        target has said one: so a drafter that costs next to nothing is followed without being verified.

        Args:
          proposed: which depths of the main chain have a token. drafted: those tokens.
          emitted, count: what became text. accepted: drafted nodes among it, of a tree's other paths too.
          depth, width: of the round.
        """
        place = jnp.arange(proposed.shape[1], dtype=jnp.int32)[None]
        right = (drafted == emitted[:, :-1]) & proposed & (place < count[:, None])
        right = jnp.cumprod(right.astype(jnp.int32), axis=1).astype(bool)
        right = right | (place < accepted[:, None])
        before = jnp.pad(right[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        seen = before & proposed & (place < count[:, None]) & active[:, None]
        fade = jnp.where(seen, _MEMORY, 1.0)
        one = active.astype(jnp.int32)
        # After a token that was right the next probe is due at once.
        again = jnp.where(right[:, 0], jnp.int32(_RAREST_PROBE), 0)
        waited = jnp.where(depth > 0, again, self.waited + 1)
        line = jnp.arange(self.rounds.shape[1], dtype=jnp.int32)[None]
        return self.replace(
            hits=self.hits * fade + (seen & right).astype(jnp.float32),
            tries=self.tries * fade + seen.astype(jnp.float32),
            waited=jnp.where(active, waited, self.waited),
            rounds=self.rounds + (line == width).astype(jnp.int32) * one[:, None],
            undrafted=self.undrafted + jnp.where(depth == 0, one, 0),
        )


def select(index: Int[Array, ""], branches, *operands):
    """`lax.switch`, or the only branch."""
    return branches[0](*operands) if len(branches) == 1 else lax.switch(index, branches, *operands)


def select_in_place(index: Int[Array, ""], branches, held):
    """`(held, result)` of one of some branches, which take `held` and give it back changed.

    Each branch is a loop of at most one turn: XLA writes to what a loop carries in place, and copies what a
    conditional does.
    """
    if len(branches) == 1:
        return branches[0](held)
    results = jax.eval_shape(branches[0], held)[1]
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), results)
    carry = (index, held, empty)
    for place, branch in enumerate(branches):

        def once(carry, branch=branch):
            held, result = branch(carry[1])
            return jnp.int32(-1), held, result

        carry = lax.while_loop(lambda carry, place=place: carry[0] == place, once, carry)
    return carry[1:]
