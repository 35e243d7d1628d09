"""Decoding over a mesh: the tokens of one device, and the collectives of the textbook."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import meshes as m
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_specdec import DecodeLoop, Decoder, UserError
from jax_specdec.core import numerics
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.sharding import Sharding, ShardingRules, shapes_at
from jax_specdec.models.tensor_parallel import divided_config, fused_order
from jax_specdec.tuning.collectives import collectives

MESHES = ((1, 1), (2, 1), (1, 2), (2, 4), (8, 1))
QUICK = {("lm", 2, 4), ("glide+cape", 2, 4), ("cascade", 1, 2), ("medusa", 8, 1)}


@pytest.mark.parametrize(
    ("name", "data", "tensor"),
    [
        pytest.param(name, *mesh, marks=() if (name, *mesh) in QUICK else pytest.mark.slow)
        for name in m.DRAFTERS
        for mesh in MESHES
    ],
)
def test_tokens_are_those_of_one_device(name, data, tensor):
    assert m.texts(name, Sharding(m.mesh_of(data, tensor))) == m.plain()


def round_text(name: str, sharding: Sharding, capacity: int = 64) -> tuple[str, DecodeLoop]:
    """The compiled rounds, which the prefill's collectives are not among."""
    target, drafter, params = m.case(name, sharding)
    loop = DecodeLoop(target, NoDrafter() if drafter is None else drafter)
    rows = (*h.pad(m.PROMPTS), m.sampling(), jnp.arange(m.BATCH, dtype=jnp.int32))
    rows = m.put_rows(rows, sharding)
    start = jax.jit(loop.start, static_argnames="capacity")
    first = start.lower(params, *rows, capacity=capacity).compile()
    state = start.eval_shape(params, *rows, capacity=capacity)
    state = shapes_at(state, first.output_shardings)
    run = jax.jit(loop.run, donate_argnums=1, out_shardings=first.output_shardings)
    program = run.lower(params, state, jnp.int32(1)).compile()
    layers = state.view.cache.k
    # Every device updates its own part of the caches in place.
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in (*layers, *state.view.cache.v))
    assert program.memory_analysis().alias_size_in_bytes >= held
    rows, heads = m.BATCH // sharding.size("batch"), target.config.num_kv_heads
    part = (rows, heads // sharding.size("kv_heads"))
    assert all(x.sharding.shard_shape(x.shape)[:2] == part for x in layers)
    return program.as_text(), loop


def test_a_round_has_the_collectives_of_the_textbook():
    """One for the embedding, two for each layer, one for the choice of the token."""
    text, _ = round_text("none", Sharding(m.mesh_of(1, 4)))
    found = [c for c in collectives(text) if not c.optional]
    assert {c.kind for c in found} == {"all-reduce"}
    hidden = m.BATCH * h.CONFIG.hidden_size * 4
    assert sum(c.times for c in found if c.size == hidden) == 1 + 2 * h.CONFIG.num_layers
    rest = [c for c in found if c.size != hidden]
    # Logits are never together: of each row, what each of four devices found, its score and its place.
    assert [(c.times, c.size) for c in rest] == [(1, m.BATCH * 4 * 2 * 4)]


def test_the_best_over_devices_is_that_of_one():
    """To the bit, and the first of equals: also where they lie on several devices, or nothing is finite."""
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, (4, 5, 32)).astype(np.float32)
    scores[0, 0], scores[0, 1] = -np.inf, 0.0
    scores[0, 1, 7:9] = -0.0
    scores[1, 0, 20] = scores[2, 0, 31] = np.inf
    scores[3, :, 17] = np.nan
    want = jax.jit(numerics.best)(scores)
    for sharding in (Sharding(m.mesh_of(2, 4)), Sharding(m.mesh_of(1, 8))):
        for given in (scores, scores[:1], scores[:, 0]):
            value, index = jax.jit(lambda x, s=sharding: numerics.best(x, s))(given)
            cut = (slice(len(given)), 0) if given.ndim == 2 else slice(len(given))
            np.testing.assert_array_equal(value, want[0][cut])
            np.testing.assert_array_equal(index, want[1][cut])


@pytest.mark.parametrize("name", ["lm", pytest.param("glide+cape", marks=pytest.mark.slow)])
def test_nothing_large_is_gathered(name):
    text, _ = round_text(name, Sharding(m.mesh_of(2, 2)))
    found = [c for c in collectives(text) if c.kind != "all-reduce"]
    # A layer's K or V of one row, any weight and one row of logits are larger.
    assert all(c.size <= 4 * 2 * h.CONFIG.hidden_size * 4 for c in found), found


def test_rows_alone_need_one_collective():
    """Over `data` only the stop test is shared."""
    text, _ = round_text("none", Sharding(m.mesh_of(4, 1)))
    found = [c for c in collectives(text) if not c.optional]
    assert all(c.kind == "all-reduce" and c.size <= 8 for c in found), found


def test_counting_finds_what_is_gathered():
    """The negative control: weights that lie divided and are needed whole."""
    mesh = m.mesh_of(1, 4)
    sharding = Sharding(mesh)
    weights = jax.device_put(jnp.ones((64, 64)), sharding.of(None, "mlp"))

    def gather(x):
        return sharding.constrain(x * 2, None, None)

    text = jax.jit(gather).lower(weights).compile().as_text()
    assert [(c.kind, c.size) for c in collectives(text)] == [("all-gather", 64 * 64 * 4)]


def test_loops_over_layers_count_each():
    mesh = m.mesh_of(1, 4)
    sharding = Sharding(mesh)
    weights = jax.device_put(jnp.ones((5, 64, 64)), sharding.of(None, "mlp", None))

    def layers(x, weights):
        def step(x, w):
            return sharding.constrain(sharding.constrain(x, None, "mlp") @ w, None, None), None

        return jax.lax.scan(step, x, weights)[0]

    text = jax.jit(layers).lower(jnp.ones((2, 64)), weights).compile().as_text()
    found = [c for c in collectives(text) if c.kind == "all-reduce"]
    assert [(c.times, c.size) for c in found] == [(5, 2 * 64 * 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2)])
def test_a_request_is_put_into_a_running_batch(data, tensor):
    sharding = Sharding(m.mesh_of(data, tensor))
    target, drafter, params = m.case("lm", sharding)
    loop = DecodeLoop(target, drafter)
    tokens, lengths = h.pad(m.PROMPTS)
    ids = jnp.arange(m.BATCH, dtype=jnp.int32)
    state = jax.jit(loop.start, static_argnames="capacity")(
        params, *m.put_rows((tokens, lengths, m.sampling(), ids), sharding), capacity=26
    )
    # Row 5 gives way to the request of row 2, under its own number.
    one = jax.tree.map(lambda x: x[2:3] if x.ndim and len(x) == m.BATCH else x, m.sampling())
    insert = jax.jit(loop.insert, donate_argnums=1)
    state = insert(params, state, 5, tokens[2:3], lengths[2:3], one, ids[2:3])
    text = jax.device_get(jax.jit(loop.run)(params, state, 99).text)
    start = len(m.PROMPTS[2])
    assert text.tokens[5, start : text.length[5]].tolist() == m.plain()[2]
    assert text.tokens[2, start : text.length[2]].tolist() == m.plain()[2]


# Rules


def test_rules_name_mesh_axes():
    rules = ShardingRules()
    assert rules.spec(("batch", None, "heads")) == PartitionSpec("data", None, "tensor")
    with pytest.raises(UserError, match=r"mesh axis 'data' would divide an array .* twice"):
        dataclasses.replace(rules, embed="data").spec(("batch", "embed"))
    with pytest.raises(UserError, match="no rule for the axis 'colour'"):
        rules.spec(("colour",))
    with pytest.raises(UserError, match="same mesh axes"):
        ShardingRules(heads="tensor", kv_heads=None)
    with pytest.raises(UserError, match="divide mlp over the mesh axis 'expert', and the mesh has"):
        Sharding(m.mesh_of(2, 2), ShardingRules(mlp="expert"))
    explicit = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with pytest.raises(UserError, match="type Auto"):
        Sharding(explicit)


def test_heads_that_do_not_divide():
    config = dataclasses.replace(h.CONFIG, num_heads=6, num_kv_heads=3)
    with pytest.raises(UserError, match=r"6 query heads and 3 KV heads .* they do over 1, 3, 6"):
        Decoder(config, sharding=Sharding(m.mesh_of(1, 2)))
    odd = dataclasses.replace(h.CONFIG, vocab_size=33)
    with pytest.raises(UserError, match=r"vocab of 33 does not divide over 2 devices"):
        Decoder(odd, sharding=Sharding(m.mesh_of(1, 2)))
    whole = ShardingRules(vocab=None)
    assert Decoder(odd, sharding=Sharding(m.mesh_of(1, 2), whole)).config.vocab_size == 33


def test_kv_heads_are_repeated():
    sharding = Sharding(m.mesh_of(1, 4))
    assert h.CONFIG.num_kv_heads == 2
    assert divided_config(h.CONFIG, sharding).num_kv_heads == 4
    order = fused_order("qkv", h.CONFIG, sharding).reshape(4, 3, h.CONFIG.head_dim)
    heads = order[:, :, 0] // h.CONFIG.head_dim
    assert heads.tolist() == [[0, 4, 6], [1, 4, 6], [2, 5, 7], [3, 5, 7]]
