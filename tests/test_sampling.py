"""Sampling laws against a sorting float64 reference, the shared noise, and plain sampling's law."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled_laws import LEVEL, chi_square, exact_law, reference_law, sample

from jax_specdec import make_sampling
from jax_specdec.core import numerics, prng
from jax_specdec.core import sampling as laws
from jax_specdec.core.context import TargetView, make_context
from jax_specdec.core.draft import Text
from jax_specdec.core.processors import RepetitionPenalty
from jax_specdec.drafters.first import First
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.errors import UserError

VOCAB = 50


@jax.jit
def law(logits, sampling):
    return laws.distribution(laws.warp(logits, sampling), sampling)


warp = jax.jit(laws.warp)

ROWS = {
    "temperature": [0.0, 1.0, 0.3, 1.7, 1.0, 1.0, 0.3, 1.7],
    "top_k": [3, 0, 5, 1, 400, 0, 10, 0],
    "top_p": [0.5, 1.0, 1.0, 1.0, 0.9, 1e-6, 0.7, 0.95],
    "min_p": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02, 0.1],
}


def rows_of(values, index):
    return {name: np.asarray(v)[index] for name, v in values.items()}


def sampling_of(**fields):
    return make_sampling(len(fields["temperature"]), max_new_tokens=1, **fields)


@pytest.mark.parametrize("vocab", [5, 40, 300, 4096])
def test_largest_against_sorting(vocab):
    """Ties, rows with fewer finite values than asked for, and vocabularies of no round size."""
    rng = np.random.default_rng(vocab)
    x = rng.integers(-40, 40, (60, vocab)).astype(np.float32)
    x[rng.random((60, vocab)) < np.linspace(0, 1, 60)[:, None]] = -np.inf
    for count in (1, 8):
        best, index = map(np.asarray, numerics.largest(jnp.asarray(x), count))
        count = min(count, vocab)
        assert best.tolist() == np.sort(x, axis=1)[:, ::-1][:, :count].tolist()
        assert (
            np.take_along_axis(x, index, axis=1)[best > -np.inf].tolist()
            == best[best > -np.inf].tolist()
        )
        assert (
            index[:, 0][best[:, 0] > -np.inf].tolist() == x.argmax(1)[best[:, 0] > -np.inf].tolist()
        )
        for row, finite in zip(index, best > -np.inf, strict=True):
            assert len(set(row[finite])) == finite.sum()


@pytest.mark.parametrize("ties", [False, True])
def test_laws_against_sorting(ties):
    """Each row with its own parameters; scores with ties, large, tiny and equal ones."""
    rng = np.random.default_rng(ties)
    for _ in range(40):
        logits = rng.normal(size=(8, 3, VOCAB)) * rng.choice([0.01, 1.0, 10.0, 80.0])
        if ties:
            logits = np.round(logits)
        logits = logits.astype(np.float32)
        got = np.asarray(law(jnp.asarray(logits), sampling_of(**ROWS)))
        for b in range(8):
            for t in range(3):
                fields = {name: values[b] for name, values in ROWS.items()}
                want = reference_law(logits[b, t], **fields)
                # A token whose inclusion hangs on the last bit of a sum may go either way.
                kept = (got[b, t] > 1e-30) != (want > 1e-30)
                if kept.any():
                    nudged = [
                        reference_law(logits[b, t], **{**fields, "top_p": fields["top_p"] + e})
                        for e in (-3e-7, 3e-7)
                    ]
                    want = min(nudged, key=lambda w: abs(w - got[b, t]).sum())
                np.testing.assert_allclose(got[b, t], want, rtol=2e-4, atol=1e-7)


def test_rows_of_a_batch_are_each_row_alone():
    """Bit by bit: no row sees another's parameters or whether another samples at all."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(8, 2, VOCAB)) * 4).astype(np.float32)
    together = warp(jnp.asarray(logits), sampling_of(**ROWS))
    for b in range(8):
        for copies in (1, 8):  # a batch of one, and the same program
            fields = {name: [values[b]] * copies for name, values in ROWS.items()}
            alone = warp(jnp.asarray(logits[[b] * copies]), sampling_of(**fields))
            np.testing.assert_array_equal(alone[0], together[b])


def test_filters_keep_what_they_say():
    """The nucleus is the smallest set that reaches top_p; min-p is relative to the best."""
    p = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    logits = jnp.asarray(np.log(p), jnp.float32)[None, None]

    def kept(**fields):
        return int((law(logits, sampling_of(temperature=[1.0], **fields)) > 0).sum())

    assert [kept(top_p=[x]) for x in (1e-9, 0.49, 0.51, 0.74, 0.76, 0.91, 0.97)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        5,
    ]
    assert [kept(min_p=[x]) for x in (1.0, 0.6, 0.4, 0.2, 0.1, 0.01)] == [1, 1, 2, 3, 4, 5]
    assert [kept(top_k=[x]) for x in (0, 1, 2, 5, 6, 2**31 - 1)] == [5, 1, 2, 5, 5, 5]


def test_all_ties_are_kept():
    logits = jnp.zeros((1, 1, VOCAB), jnp.float32)
    for fields in ({"top_k": [3]}, {"top_p": [0.1]}, {"min_p": [1.0]}):
        got = law(logits, sampling_of(temperature=[1.0], **fields))
        np.testing.assert_allclose(got, 1 / VOCAB, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1.2e-38])
def test_temperatures_near_zero(temperature):
    """No overflow and no NaN: the law tends to the argmax, equally good tokens share it."""
    logits = jnp.asarray([[[3.0, -80.0, 7.5, 7.5, -7.5, 0.0]]], jnp.float32)
    got = np.asarray(law(logits, sampling_of(temperature=[temperature])))
    np.testing.assert_allclose(got[0, 0], [0, 0, 0.5, 0.5, 0, 0], atol=1e-6)
    filtered = law(logits, sampling_of(temperature=[temperature], top_p=[0.9], min_p=[0.1]))
    np.testing.assert_allclose(filtered[0, 0], [0, 0, 0.5, 0.5, 0, 0], atol=1e-6)


def test_impossible_tokens_stay_impossible():
    """A processor's -inf survives every temperature and filter."""
    logits = np.zeros((4, 1, VOCAB), np.float32)
    logits[:, :, 7:] = -np.inf
    fields = {"temperature": [0.0, 0.3, 1.0, 1.7], "top_k": [0, 20, 0, 0], "top_p": [1, 1, 0.9, 1]}
    got = np.asarray(law(jnp.asarray(logits), sampling_of(**fields)))
    assert np.isfinite(got).all() and (got[..., 7:] == 0).all()
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


# Noise


def test_noise_is_a_function_of_key_role_and_position():
    keys = jnp.asarray([[1, 2], [3, 4], [1, 2]], jnp.uint32)
    start = jnp.asarray([5, 9, 7], jnp.int32)
    noise = prng.position_noise(keys, start, 6, 8)
    np.testing.assert_array_equal(noise[0, 2:], noise[2, :4])  # the same key and positions
    assert (noise[0] != noise[1]).any()
    longer = prng.position_noise(keys, start - 2, 9, 8)
    np.testing.assert_array_equal(longer[:, 2:8], noise)
    one = prng.position_noise(keys[1:2], start[1:2], 6, 8)
    np.testing.assert_array_equal(one[0], noise[1])
    flat = [prng.position_noise(keys[:1], start[:1], 6, 8, role).ravel() for role in range(5)]
    assert len(np.unique(np.concatenate(flat))) == 5 * 48
    # Nor does it matter of how many tokens it is made, or of which.
    wide = prng.position_noise(keys, start, 6, 1001)
    np.testing.assert_array_equal(wide[..., :8], noise)
    words = jnp.asarray([999, 0, 7, 500, 13], jnp.int32)
    some = prng.position_noise(keys, start, 6, 1001, words=words)
    np.testing.assert_array_equal(some, wide[..., words])


def test_the_law_of_the_noise():
    """Kolmogorov and Smirnov's distance from Gumbel's law, and of uniforms from theirs; neighbours are not related."""
    keys, start = jnp.asarray([[1, 2], [3, 4]], jnp.uint32), jnp.asarray([0, 70], jnp.int32)
    noise = np.asarray(prng.position_noise(keys, start, 64, 4099), np.float64)
    uniform = np.asarray(prng.position_uniform(keys, start, 50_000, prng.ROLE_ACCEPT), np.float64)
    for values in (np.exp(-np.exp(-noise)), uniform):
        flat = np.sort(values.ravel())
        distance = np.abs(flat - (np.arange(flat.size) + 0.5) / flat.size).max()
        assert distance * np.sqrt(flat.size) < 1.63  # of one sample in a hundred
        for axis in range(values.ndim):
            lagged = np.corrcoef(
                np.take(values, range(values.shape[axis] - 1), axis).ravel(),
                np.take(values, range(1, values.shape[axis]), axis).ravel(),
            )[0, 1]
            assert abs(lagged) < 5 / np.sqrt(values.size / 2)


def test_noise_is_zero_for_greedy_rows_only():
    keys = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)
    start = jnp.asarray([5, 9], jnp.int32)
    mixed = prng.shared_noise(keys, sampling_of(temperature=[0.0, 1e-20]), start, 3, 8)
    assert (mixed[0] == 0).all()
    np.testing.assert_array_equal(mixed[1], prng.position_noise(keys, start, 3, 8)[1])
    cold = prng.shared_noise(keys, sampling_of(temperature=[0.0, 0.0]), start, 3, 8)
    assert (cold == 0).all()


def test_row_keys():
    ids = jnp.asarray([0, 1, 1, 5], jnp.int32)
    sampling = make_sampling(4, max_new_tokens=1, seed=[3, 3, 4, 2**32 - 1])
    keys = prng.row_keys(sampling, ids)
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 4
    own = make_sampling(4, max_new_tokens=1, seed=3, own_seed=[True, True, False, False])
    keys = np.asarray(prng.row_keys(own, ids))
    assert (keys[0] == keys[1]).all() and (keys[2] != keys[0]).any()


# What users may pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", -1.0),
        ("top_p", float("nan")),
        ("top_p", 1e-60),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
    ],
)
def test_values_out_of_range(field, value):
    for given in (value, [1, value]):
        with pytest.raises(UserError, match=f"{field} must be .*, got"):
            make_sampling(2, **{"max_new_tokens": 4, field: given})


def test_values_at_the_edge():
    got = make_sampling(
        2, max_new_tokens=1, top_p=1.0, min_p=[0.0, 1.0], seed=2**32 - 1, temperature=[0, 1e6]
    )
    assert got.seed.dtype == jnp.uint32 and got.seed.tolist() == [2**32 - 1] * 2
    assert got.stop_ids.shape == (2, 0) and got.stop_table.shape == (0, 1)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf")])
def test_repetition_penalty_out_of_range(penalty):
    with pytest.raises(UserError, match="repetition penalty"):
        RepetitionPenalty(penalty)


# What the lm drafter reports


@jax.jit
def forward(params, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return h.SMALL.apply(params, tokens, positions).logits


@pytest.mark.parametrize("rejecting", [True, False])
def test_what_is_reported_of_a_draft(rejecting):
    """q after all warpers, tokens the argmax of it and the noise, and the best children."""
    drafter = LmDrafter(h.SMALL, 3)
    params = {"lm": h.small_params()}
    tokens, lengths = h.pad(h.prompts_of([4, 9, 1, 12]), 24)
    text, view = Text(tokens, lengths), TargetView(None)
    sampling = make_sampling(
        4,
        max_new_tokens=9,
        temperature=[0.0, 1.0, 0.3, 1.7],
        top_k=[0, 4, 0, 9],
        top_p=[1.0, 1.0, 0.8, 0.9],
    )
    keys = prng.row_keys(sampling, jnp.arange(4, dtype=jnp.int32))
    gumbel = prng.shared_noise(keys, sampling, lengths, 4, h.VOCAB)
    fields = {"keys": keys, "return_q": rejecting, "return_top": True}
    ctx = make_context(text, view, sampling, h.VOCAB, **fields)

    @jax.jit
    def draw(params):
        states = drafter.extend(params, drafter.init(4, 24), ctx)
        return drafter.draft(params, states, ctx)[0]

    draft, gumbel = jax.device_get((draw(params), gumbel))
    assert (draft.q is not None) == rejecting
    for b, temperature in enumerate(np.asarray(sampling.temperature).tolist()):
        row = np.asarray(tokens[b, : lengths[b]]).tolist()
        for d in range(3):
            path = row + np.asarray(draft.tokens[b, 1 : d + 1]).tolist()
            padded = jnp.asarray([path + [0] * (24 - len(path))], jnp.int32)
            logits = np.asarray(forward(params["lm"], padded)[0, len(path) - 1])
            law = reference_law(
                logits, temperature, int(sampling.top_k[b]), float(sampling.top_p[b])
            )
            token = int(draft.tokens[b, d + 1])
            with np.errstate(divide="ignore"):
                assert token == (np.log(law) + gumbel[b, d]).argmax()
            if rejecting:
                np.testing.assert_allclose(draft.q[b, d], law, atol=2e-5)
            possible = law > 0 if temperature > 0 else np.ones_like(law, bool)
            shift = 0 if rejecting else temperature * gumbel[b, d]
            check_children(draft, b, d, np.where(possible, logits + shift, -np.inf))
        assert (draft.top_probs[b, 3] == 0).all()


def check_children(draft, b, d, scores):
    """The drafted token first, then the next best of the scores, with their softmax."""
    soft = reference_law(scores, 1.0)
    token = int(draft.tokens[b, d + 1])
    assert abs(draft.probability[b, d + 1] - soft[token]) < 2e-5
    best = [token, *(int(i) for i in np.argsort(-scores) if i != token)][:8]
    np.testing.assert_allclose(draft.top_probs[b, d], soft[best], atol=2e-5)
    possible = soft[best] > 0
    assert draft.top_ids[b, d][possible].tolist() == np.asarray(best)[possible].tolist()


SAMPLERS = {
    "plain": lambda: sample(),
    "match lm": lambda: sample(LmDrafter(h.TARGET, 2), lm=h.close_params()),
    "match max-gram": lambda: sample(MaxGram(2)),
    "reject lm": lambda: sample(LmDrafter(h.TARGET, 2), "reject", lm=h.close_params()),
    "reject max-gram": lambda: sample(MaxGram(2), "reject"),
    "reject first": lambda: sample(
        First((MaxGram(2), LmDrafter(h.TARGET, 2))), "reject", lm=h.close_params()
    ),
    "reject siblings": lambda: sample(
        h.Siblings(LmDrafter(h.TARGET, 2)), "reject", lm=h.close_params()
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_chi_square(name):
    """More than 20,000 generations, temperatures and filters mixed in each batch."""
    counts = SAMPLERS[name]()
    assert counts.sum() >= 20_000
    for case in range(4):
        assert chi_square(counts[case], exact_law(case)) > LEVEL


def test_chi_square_finds_a_wrong_sampler(monkeypatch):
    """The negative controls: temperature left out, one key for all positions, tokens shifted."""
    right = prng.position_noise

    def frozen(keys, start, depth, vocab, role=prng.ROLE_MATCH, words=None):
        assert words is None
        return right(keys, jnp.zeros_like(start), 1, vocab, role).repeat(depth, axis=1)

    with monkeypatch.context() as patch:
        patch.setattr(prng, "position_noise", frozen)
        counts = sample()
        assert all(chi_square(counts[c], exact_law(c)) < LEVEL for c in range(4))
        # The first token alone is right, so a test of marginals would not see it.
        marginal = chi_square(counts[1].sum(1), exact_law(1).sum(1))
        assert marginal > LEVEL
    with monkeypatch.context() as patch:
        patch.setattr(laws, "warp", lambda logits, sampling: logits)
        counts = sample()
        assert all(chi_square(counts[c], exact_law(c)) < LEVEL for c in range(4))


def test_chi_square_finds_a_shared_uniform(monkeypatch):
    """Residual draws from the key of the draft: the rejection rule is then biased."""
    monkeypatch.setattr(prng, "ROLE_RESIDUAL", prng.ROLE_DRAFT)
    counts = sample(LmDrafter(h.TARGET, 2), "reject", lm=h.close_params())
    assert min(chi_square(counts[c], exact_law(c)) for c in range(4)) < LEVEL
