"""Training GliDe: what is seen, the losses, the measurements, exact resume."""

import dataclasses
import functools
import json

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import UserError
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.training import glide, losses
from jax_specdec.training.config import GliDeRecipe, TrainConfig
from jax_specdec.training.glide_mask import drafts, random_drafts, visible_keys

pytestmark = pytest.mark.usefixtures("two_devices")

MODEL = GliDe(
    GliDeConfig(16, mlp_size=16, num_heads=2, num_kv_heads=1, head_dim=8, trained_delay=4),
    h.SMALL_CONFIG,
)
RUN = TrainConfig(
    steps=4, batch_size=4, sequence_length=16, warmup_steps=1, eval_every=2, save_every=2
)


@pytest.fixture(autouse=True, scope="module")
def ordinary_promotion():
    """Optax schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def documents():
    rng = np.random.default_rng(0)
    return [(np.arange(rng.integers(5, 30)) * 3 % 31).astype(np.int32) for _ in range(40)]


def run(folder, config=RUN, model=MODEL, recipe=None, **options):
    recipe = recipe or GliDeRecipe()
    args = (model, h.SMALL, h.small_params(), recipe, config, documents(), documents()[:12], folder)
    glide.train(*args, progress=False, **options)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What is seen


@pytest.mark.parametrize("delay", [1, 5, 16])
def test_the_papers_blocks(delay):
    got = np.asarray(visible_keys("block", (2, 40), delay, jax.random.key(0)))
    for i in range(40):
        keys = [k for k in range(40) if k // delay < i // delay]
        assert got[:, i].tolist() == [len(keys)] * 2


def test_shifts_train_every_delay():
    seen = set()
    for step in range(40):
        got = np.asarray(visible_keys("shift", (8, 30), 16, jax.random.key(step)))
        delays = np.arange(30) + 1 - got  # of the queries that see anything
        for row in range(8):
            here = set(delays[row][got[row] > 0].tolist())
            assert len(here) == 1, "a text has one delay"
            seen |= here
    assert seen == set(range(1, 17))
    many = np.asarray(visible_keys("shift", (16_000, 17), 16, jax.random.key(0)))
    share = np.bincount(17 - many[:, -1], minlength=17)[1:] / 16_000
    assert abs(share * 16 - 1).max() < 0.15, "the delays are uniform"
    none = np.asarray(visible_keys("none", (1, 5), 16, jax.random.key(0)))
    assert none.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("hidden", [False, True])
def test_nothing_of_the_hidden_keys_reaches_a_prediction(hidden):
    """A later token of the text changes what the target makes of it; a query must not see that."""
    config = dataclasses.replace(MODEL.config, hidden_input=hidden)
    pair = glide.Pair(GliDe(config, h.SMALL_CONFIG), h.SMALL, GliDeRecipe())
    own = pair.model.init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, h.VOCAB, (1, 12)), jnp.int32)
    visible = visible_keys("block", (1, 12), 4, jax.random.key(0))

    def read(tokens, others):
        reading = pair.read(h.small_params(), jnp.pad(others, ((0, 0), (0, 1))))
        tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
        return np.asarray(pair.drafter_reads(own, h.small_params(), reading, tokens, visible))[0]

    want = read(tokens, tokens)
    changed = read(tokens, tokens.at[0, 4:8].set(1))  # the second block of the target's text
    assert np.array_equal(changed[:8], want[:8]), "the first two blocks see no key of the second"
    assert not np.allclose(changed[8:], want[8:])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_layers": 2},
        {"hidden_input": True, "hidden_delays": 3},
        {"num_layers": 2, "hidden_input": True, "window": 3},
        {"num_layers": 2, "cross_attention": False},
    ],
    ids=str,
)
def test_both_readings_of_a_text_are_decodings(fields):
    """For each root, the reading of all before it at delay 1 and of its draft behind it, one after the other."""
    length, longest = 13, 4
    config = dataclasses.replace(MODEL.config, **fields)
    pair = glide.Pair(GliDe(config, h.SMALL_CONFIG), h.SMALL, GliDeRecipe(visibility="draft"))
    own = pair.model.init(jax.random.key(0))
    if "hidden_in" in own:
        own["hidden_in"] = jax.random.normal(jax.random.key(1), own["hidden_in"].shape)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, h.VOCAB, (2, length + 1)), jnp.int32)
    reading = pair.read(h.small_params(), tokens)
    read = functools.partial(pair.drafter_reads, own, h.small_params(), reading, tokens)
    first = jnp.asarray([[0], [2]], jnp.int32)
    seen = drafts((2, length), longest, first, config.window)
    got = np.asarray(read(seen.visible, seen.ancestors))
    at, delay = np.arange(length), np.asarray(seen.delay)
    assert (delay[:, :length] == 1).all() and set(delay[:, length:].flat) == {0, 2, 3, 4}
    for root in range(length):
        want = np.asarray(read(jnp.broadcast_to(jnp.minimum(at, root), (2, length))))
        np.testing.assert_allclose(got[:, root], want[:, root], atol=1e-4)
        for row in range(2):
            if (root + 1 - int(first[row, 0])) % (longest - 1) == 0:
                draft = slice(root + 1, root + longest)
                assert delay[row, length:][draft].tolist() == [2, 3, 4][: length - root - 1]
                found = got[row, length:][draft]
                np.testing.assert_allclose(found, want[row, draft], atol=1e-4)


def test_random_drafts_begin_anywhere():
    seen = random_drafts((300, 20), 5, jax.random.key(0))
    share = np.bincount(np.asarray(seen.delay)[:, -1], minlength=6)[2:] / 300
    assert abs(share * 4 - 1).max() < 0.3, "the delays of one place are uniform"


# Losses


def laws(seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(7, 0.3), 5), rng.dirichlet(np.full(7, 0.3), 5)


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_losses_in_float64(beta):
    p, q = laws(0)
    labels = np.arange(5)
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * np.log(a / b)).sum(-1)

    want = {
        "cross_entropy": -np.log(q[np.arange(5), labels]),
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": abs(p - q).sum(-1) / 2,
    }
    log_p, log_q = (jnp.log(jnp.asarray(x, jnp.float32)) for x in (p, q))
    assert set(want) == set(losses.LOSSES)
    for name, value in want.items():
        got = losses.mixture(((name, 2.0),), log_p, log_q, jnp.asarray(labels), beta)
        np.testing.assert_allclose(got, 2 * value, rtol=1e-4, atol=1e-5)
    mixed = losses.parse_mixture("forward_kl=0.75, total_variation=0.25")
    got = losses.mixture(mixed, log_p, log_q, jnp.asarray(labels), beta)
    wanted = 0.75 * want["forward_kl"] + 0.25 * want["total_variation"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    acceptance, match = losses.agreement(log_p, log_q)
    np.testing.assert_allclose(acceptance, 1 - want["total_variation"], rtol=1e-4)
    assert match.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


@pytest.mark.parametrize("text", ["kl", "forward_kl=0", "forward_kl=x", "forward_kl,", ""])
def test_mixtures_that_are_refused(text):
    with pytest.raises(UserError, match=r"Unknown loss|The weight of"):
        losses.parse_mixture(text)


# Runs


def test_a_killed_and_resumed_run_logs_the_losses_of_one_that_was_not(tmp_path):
    def logged(rows):
        names = ("step", "loss", "heldout_loss", "acceptance", "greedy_match")
        return [tuple(row.get(name) for name in names) for row in rows]

    saved = []
    config = dataclasses.replace(RUN, optimizer="muon", accumulate=2)
    whole = run(tmp_path / "whole", config, on_save=saved.append)
    assert len(saved) == 2
    cut = run(tmp_path / "cut", config, stop_after=3)
    assert [row["step"] for row in cut] == [1, 2, 3]
    assert logged(run(tmp_path / "cut", config, resume=True)) == logged(whole)
    # Killed after the last save of the state and before what follows it.
    run(tmp_path / "cut", config, resume=True, on_save=saved.append)
    assert len(saved) == 3
    last = whole[-1]
    assert len(last["acceptance"]) == len(last["greedy_match"]) == 8  # half of a window
    assert all(0 <= value <= 1 for value in last["acceptance"] + last["greedy_match"])
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path / "cut", config, resume=True, fingerprint="another target")


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ({"loss": "total_variation=0.5,forward_kl=0.5"}, {}),
        ({"loss": "cross_entropy", "visibility": "block"}, {"cross_norm": False, "share": False}),
        ({"visibility": "none", "loss": "jensen_shannon"}, {"trained_delay": 1}),
        ({"loss": "reverse_kl"}, {"cross_attention": False}),
        ({"visibility": "draft"}, {"num_layers": 2, "window": 3}),
        ({"visibility": "draft"}, {"trained_delay": 1}),
        ({}, {"hidden_input": True}),
        ({}, {"hidden_input": True, "hidden_delays": 3}),
    ],
)
def test_every_form_learns(recipe, fields, tmp_path):
    model = GliDe(dataclasses.replace(MODEL.config, **fields), h.SMALL_CONFIG)
    config = dataclasses.replace(
        RUN, steps=12, learning_rate=2e-2, eval_every=12, save_every=12, remat=True
    )
    rows = run(tmp_path, config, model, GliDeRecipe(**recipe))
    assert np.mean([r["loss"] for r in rows[-3:]]) < np.mean([r["loss"] for r in rows[:3]])


def test_data_parallel_training_gives_the_losses_of_one_device(tmp_path, monkeypatch):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    config = dataclasses.replace(RUN, steps=2, eval_every=2)
    several = run(tmp_path / "several", config)
    monkeypatch.setattr(jax, "devices", lambda *args: devices[:1])
    alone = run(tmp_path / "alone", config)
    for a, b in zip(several, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_measured_acceptance_of_a_drafter_that_is_its_target():
    """A drafter with the target's own layer and no glimpse agrees everywhere, at every delay."""
    model = GliDe(dataclasses.replace(MODEL.config, cross_attention=False), h.SMALL_CONFIG)
    target = h.small_params()
    own = {"layers": target["layers"], "norm": target["norm"]}
    objective = glide.make_objective(model, h.SMALL, target, GliDeRecipe(), RUN)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, h.VOCAB, (2, 33)), jnp.int32)
    found = objective.measure(own, target, tokens)
    np.testing.assert_allclose(found["acceptance"], np.ones(16), atol=1e-4)
    np.testing.assert_allclose(found["greedy_match"], np.ones(16))
    assert abs(float(found["heldout_loss"])) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visibility": "some"}, "draft, shift, block or none"),
        ({"jensen_shannon_beta": 1.0}, "between 0"),
    ],
)
def test_recipes_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        GliDeRecipe(**fields)
