"""Laws in float64: of one step by sorting, of two steps from the logits, and the chi-square of samples."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jax_specdec import make_generate, make_sampling
from jax_specdec.core.acceptance import RULES

# The reference: sort, in float64


def reference_law(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row; ties at a threshold are all kept, as in the library."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    x = logits / temperature
    if top_k > 0:
        x = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], x, -np.inf)
    p = np.exp(x - x.max())
    if top_p < 1:
        order = np.sort(p)[::-1]
        cut = order[np.searchsorted(np.cumsum(order), top_p * p.sum())]
        p = np.where(p >= cut, p, 0)
    if min_p > 0:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


# Chi-square: the first two tokens of whole generations against the exact law

BATCH, RANGES = 512, 40
PROMPT = [3, 1, 4, 1, 5]
CASES = {  # one row in four each, mixed in every batch
    "temperature": [0.3, 1.0, 1.7, 1.0],
    "top_k": [0, 0, 6, 0],
    "top_p": [1.0, 0.8, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.1],
}
SMALLEST_EXPECTED = 5
LEVEL = 1e-6  # of a false alarm, per test


@functools.cache
def exact_law(case: int) -> np.ndarray:
    """P(first, second token), `[V, V]`, in float64 from the model's logits."""
    fields = {name: values[case] for name, values in CASES.items()}
    after = np.tile(np.asarray([*PROMPT, 0]), (h.VOCAB, 1))
    after[:, -1] = np.arange(h.VOCAB)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (h.VOCAB, 6))
    logits = np.asarray(
        h.TARGET.apply(h.target_params(), jnp.asarray(after, jnp.int32), positions).logits
    )
    first = reference_law(logits[0, -2], **fields)
    second = np.stack([reference_law(x[-1], **fields) for x in logits])
    return first[:, None] * second


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value; cells that are expected less than five times are put together."""
    total = counts.sum()
    counts, expected = counts.ravel(), law.ravel() * total
    if counts[expected == 0].any():
        return 0.0
    rare = expected < SMALLEST_EXPECTED
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep] * (total / expected[keep].sum())).pvalue


def sample(drafter=None, rule="match", ranges=RANGES, shift=0, **drafts):
    """Counts of the first two tokens by case, `[4, V, V]`, from BATCH * ranges generations."""
    generate = jax.jit(make_generate(h.TARGET, drafter, max_new_tokens=3, rule=RULES[rule]()))
    sampling = make_sampling(
        BATCH,
        max_new_tokens=3,
        stop_ids=(-1,),
        seed=11,
        **{name: np.tile(values, BATCH // 4) for name, values in CASES.items()},
    )
    tokens, lengths = h.pad([PROMPT] * BATCH, len(PROMPT))
    counts = np.zeros((4, h.VOCAB, h.VOCAB), np.int64)
    params = h.all_params(**drafts)
    for i in range(ranges):
        ids = jnp.arange(i * BATCH, (i + 1) * BATCH, dtype=jnp.int32)
        text, _ = generate(params, tokens, lengths, sampling, ids)
        pair = np.asarray(text.tokens)[:, len(PROMPT) : len(PROMPT) + 2]
        np.add.at(counts, (np.arange(BATCH) % 4, pair[:, 0], (pair[:, 1] + shift) % h.VOCAB), 1)
    return counts
