"""Acceptance rules enumerated in float64: the joint law of a whole block, not its marginals.

A rule draws by comparing uniforms with thresholds and by Gumbel argmax. Each outcome is forced through
the real function with the noise that only just selects it if the function's law is the expected one: so
a wrong threshold, a wrong residual or a wrong row of p selects something else, and the law moves.
"""

import functools
import itertools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.core import acceptance
from jax_specdec.core.draft import Draft

NUDGE = 1e-12
ROWS = 512  # one shape for all enumerations, so that every operation is compiled once


def random_law(rng, vocab, zeros=0.0, one_hot=False):
    if one_hot:
        return np.eye(vocab)[rng.integers(vocab)]
    weight = rng.gamma(0.7, size=vocab) + 1e-3
    dead = rng.random(vocab) < zeros
    if dead.all():
        dead[rng.integers(vocab)] = False
    weight = np.where(dead, 0.0, weight)
    return weight / weight.sum()


def model(rng, vocab, depth, **kind):
    """A law for every prefix of up to `depth` tokens."""
    return {
        prefix: random_law(rng, vocab, **kind)
        for n in range(depth + 1)
        for prefix in itertools.product(range(vocab), repeat=n)
    }


def selects(law, token):
    """Gumbel noise under which `token` wins by a hair if and only if it is drawn from `law`."""
    with np.errstate(divide="ignore"):
        noise = np.where(law > 0, -np.log(np.where(law > 0, law, 1.0)), 1e3)  # zero must never win
    noise[token] += NUDGE
    return noise


def norm(x):
    return x / x.sum() if x.sum() > 0 else None


class Joint:
    """The law of the first `length` tokens, short outputs continued by the target."""

    def __init__(self, p, vocab, length):
        self.p, self.vocab, self.length = p, vocab, length
        self.mass = dict.fromkeys(itertools.product(range(vocab), repeat=length), 0.0)

    def add(self, tokens, weight):
        tokens = tuple(int(t) for t in tokens[: self.length])
        if len(tokens) == self.length:
            self.mass[tokens] += weight
            return
        for token in range(self.vocab):
            if self.p[tokens][token] > 0:
                self.add((*tokens, token), weight * self.p[tokens][token])

    def distance(self):
        """Total variation from the target's law."""
        want = Joint(self.p, self.vocab, self.length)
        want.add((), 1.0)
        return 0.5 * sum(abs(self.mass[s] - want.mass[s]) for s in self.mass)


# Speculative sampling with residual-then-match siblings


def sibling_ids(q, drawn, count):
    order = np.argsort(-q, kind="stable")
    return [int(t) for t in order if t != drawn][:count]


def enumerate_reject(p, q, vocab, depth, siblings=0, drafted=None, draw=None):
    """The law of a block under `acceptance.reject`, every outcome forced once.

    Args:
      siblings: how many of q's best others each chain token has, or `(q at each depth, chain) ->
        siblings at each depth`.
      drafted: how many chain tokens are valid. draw: the law that tokens are really drawn from, where
        it is not q.
    """
    drafted = depth if drafted is None else drafted
    if isinstance(siblings, int):
        count = siblings

        def siblings(q_at, chain):
            return [sibling_ids(q_at[d], chain[d], count) for d in range(depth)]

    draw = q if draw is None else draw
    rows, weight = [], []
    for chain in itertools.product(range(vocab), repeat=depth):
        drawn = np.prod([draw[chain[:d]][chain[d]] for d in range(depth)])
        if drawn == 0:
            continue
        p_at = [p[chain[:d]] for d in range(depth + 1)]
        q_at = [q[chain[:d]] for d in range(depth)]
        ratio = [
            1.0 if p_at[d][chain[d]] >= q_at[d][chain[d]] else p_at[d][chain[d]] / q_at[d][chain[d]]
            for d in range(depth)
        ]
        sib = siblings(q_at, chain)
        for count in range(drafted + 1):
            w = drawn * np.prod(ratio[:count])
            rejected = count < drafted
            if rejected:
                w *= 1 - ratio[count]
                left = norm(np.maximum(p_at[count] - q_at[count], 0))
                law = p_at[count] if left is None else left
            else:
                law = p_at[count]
            if w <= 0:
                continue
            u = np.zeros(depth)
            for d in range(count):
                u[d] = np.nextafter(1, 0) if ratio[d] == 1 else max(0.0, ratio[d] - NUDGE)
            if rejected:
                u[count] = min(np.nextafter(1, 0), ratio[count] + NUDGE) if ratio[count] else 0.0
            for last in range(vocab):
                if law[last] == 0:
                    continue
                found = rejected and last in sib[count]
                after = p[(*chain[:count], last)] if found else np.eye(vocab)[0]
                for bonus in range(vocab):
                    if after[bonus] == 0:
                        continue
                    # NaN wherever nothing may be drawn from: it would win every argmax.
                    residual = np.full((depth + 1, vocab), np.nan)
                    target = np.full((depth + 1, vocab), np.nan)
                    (residual if rejected else target)[count] = selects(law, last)
                    if found:
                        target[count + 1] = selects(after, bonus)
                    rows.append((chain, sib, u, residual, target))
                    weight.append(w * law[last] * (after[bonus] if found else 1.0))
    verdict = drive_reject(p, q, rows, vocab, depth, drafted)
    joint = Joint(p, vocab, depth + 1)
    for tokens, accepted, w in zip(verdict.tokens, verdict.accepted, weight, strict=True):
        joint.add(tokens[: accepted + 1], w)
    assert abs(sum(weight) - 1) < 1e-9
    return joint, verdict


def drive_reject(p, q, rows, vocab, depth, drafted):
    siblings = max(len(level) for row in rows for level in row[1])
    nodes = 1 + depth + depth * siblings
    count = len(rows)
    assert count <= ROWS
    rows = rows + rows[:1] * (ROWS - count)
    tokens = np.zeros((ROWS, nodes), np.int32)
    p_rows = np.zeros((ROWS, nodes, vocab))
    q_rows = np.zeros((ROWS, depth, vocab))
    parent = [0, *range(depth), *(d for d in range(depth) for _ in range(siblings))]
    valid = np.ones((ROWS, nodes), bool)
    for i, (chain, sib, *_) in enumerate(rows):
        tokens[i, 1 : depth + 1] = chain
        for d in range(depth + 1):
            p_rows[i, d] = p[chain[:d]]
        for d in range(depth):
            q_rows[i, d] = q[chain[:d]]
            level = sib[d]
            for j, token in enumerate(level):
                node = depth + 1 + d * siblings + j
                tokens[i, node] = token
                p_rows[i, node] = p[(*chain[:d], token)]
            valid[i, depth + 1 + d * siblings + len(level) : depth + 1 + (d + 1) * siblings] = False
    valid[:, drafted + 1 : depth + 1] = False
    valid[:, depth + 1 :] &= np.asarray(parent[depth + 1 :], int) < drafted
    parents = np.broadcast_to(np.asarray(parent, np.int32), tokens.shape)
    depths = np.where(np.arange(nodes) <= depth, np.arange(nodes), parents + 1)
    draft = Draft(
        tokens=jnp.asarray(tokens),
        valid=jnp.asarray(valid),
        source=jnp.asarray(tokens),
        probability=jnp.asarray(np.ones(tokens.shape, np.float32)),
        depth_limit=depth,
    )
    if siblings:
        draft = draft.replace(
            parent=jnp.asarray(parents), depth=jnp.asarray(depths.astype(np.int32))
        )
    stack = [jnp.asarray(np.stack([r[i] for r in rows])) for i in (2, 3, 4)]
    rule = program("reject")
    return jax.tree.map(lambda x: np.asarray(x)[:count], rule(draft, p_rows, q_rows, *stack))


def program(rule):
    """A rule as one program, the ancestors of a tree included: operations of their own would cost more to
    compile than all the rest. What a test puts in place of a part of it gives another program.
    """
    parts = ("reject", "match", "residual", "accepts")
    return _program(getattr(acceptance, rule), *(getattr(acceptance, part) for part in parts))


@functools.cache
def _program(rule, *_):
    def judge(draft, *args):
        if draft.parent is not None:
            draft = draft.replace(ancestors=h.ancestor_bits(draft.parent, draft.depth_limit))
        return rule(draft, *args)

    return jax.jit(judge)


KINDS = {
    "dense": ({}, {}),
    "q with zeros": ({}, {"zeros": 0.4}),
    "p with zeros": ({"zeros": 0.4}, {}),
    "both with zeros": ({"zeros": 0.4}, {"zeros": 0.4}),
    "greedy target": ({"one_hot": True}, {}),
    "greedy drafter": ({}, {"one_hot": True}),
    "both greedy": ({"one_hot": True}, {"one_hot": True}),
}


def pair(kind, seed, vocab, depth):
    rng = np.random.default_rng(seed)
    of_p, of_q = KINDS[kind]
    return model(rng, vocab, depth + 2, **of_p), model(rng, vocab, depth, **of_q)
