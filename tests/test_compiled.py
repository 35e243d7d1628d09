"""What the compiler makes of the loop: no copies of a cache, few programs, bounded memory, any mesh."""

import collections
import dataclasses
import gc
import re
from pathlib import Path
from types import SimpleNamespace

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import compiled, large_copies
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_specdec import DecodeLoop, SpeculativeDecoder, Target, make_generate
from jax_specdec.core import cache as kv
from jax_specdec.core import prefill
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import Decoder, stack_layers
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.specs.build import LoadedDrafter

CAPACITY = 300  # a layer's K is then larger than every weight and every activation
LM = LmDrafter(h.TARGET, 4)


def lowered_run(loop, params, batch, capacity=CAPACITY):
    tokens, lengths = jnp.zeros((batch, 16), jnp.int32), jnp.full((batch,), 9, jnp.int32)
    sampling, ids = h.sampling_of(batch, temperature=1.0), jnp.arange(batch, dtype=jnp.int32)
    state = jax.eval_shape(
        lambda *a: loop.start(*a, capacity=capacity), params, tokens, lengths, sampling, ids
    )
    return state, jax.jit(loop.run, donate_argnums=1).lower(params, state, jnp.int32(1))


def case(name):
    """(loop, parameters) by name."""
    if name == "none":
        return h.plain_loop(), h.all_params()
    if name in ("cape", "grown"):
        drafter = LmDrafter(h.TARGET, 3)
        drafter = Expand(drafter, Cape(12) if name == "cape" else DynamicTree(12))
        return DecodeLoop(h.TARGET, drafter), h.all_params(lm=h.close_params())
    if name == "tree":
        drafter = h.Siblings(LmDrafter(h.TARGET, 3))
        return DecodeLoop(h.TARGET, drafter), h.all_params(lm=h.close_params())
    if name.startswith("glide"):
        fields = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
        shape = GliDeConfig(**{field: getattr(h.CONFIG, field) for field in fields})
        _, layers, *hidden = name.split()
        shape = dataclasses.replace(shape, num_layers=int(layers), hidden_input=bool(hidden))
        model = GliDe(shape, h.CONFIG)
        params = model.join(model.init(jax.random.key(0)), h.target_params())
        return DecodeLoop(h.TARGET, GliDeDrafter(model, 4)), h.all_params(glide=params)
    if name == "stacked":
        target = Decoder(h.CONFIG, stacked_cache=True)
        return DecodeLoop(target, LmDrafter(target, 4)), h.all_params(lm=h.close_params())
    if name == "scan":
        target = Decoder(h.CONFIG, layer_loop="scan")
        params = stack_layers(h.target_params())
        loop = DecodeLoop(target, LmDrafter(target, 4))
        return loop, h.all_params(target=params, lm=stack_layers(h.close_params()))
    return DecodeLoop(h.TARGET, LM), h.all_params(lm=h.close_params())


LOOPS = (
    *("none", "lm", "tree", "cape", "grown", "scan", "stacked"),
    *("glide 1", "glide 2", "glide 1 hidden"),
)
# With every test; eight rows have one more thing to look at.
QUICK = {("none", 1), ("lm", 1), ("lm", 8), ("grown", 8), ("stacked", 8), ("glide 1 hidden", 8)}
CASES = [
    pytest.param(name, batch, marks=() if (name, batch) in QUICK else pytest.mark.slow)
    for name in LOOPS
    for batch in (1, 8)
]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_no_copy_of_a_cache_in_the_loop(name, batch, monkeypatch):
    # A catching-up chunk of 256 has activations larger than these small caches.
    monkeypatch.setattr(prefill, "default_chunk", lambda: 16)
    loop, params = case(name)
    state, lowered = lowered_run(loop, params, batch)
    c = h.CONFIG
    layer = batch * c.num_kv_heads * c.head_dim * CAPACITY
    assert layer > max(x.size for x in jax.tree.leaves(params["target"])) or name == "scan"
    program = compiled(lowered)
    assert large_copies(program.as_text(), layer) == []
    memory = program.memory_analysis()
    # The state is updated in place, and scratch memory is no second copy of it.
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes > 0.9 * size
    assert batch == 1 or memory.temp_size_in_bytes < 0.75 * size


def test_copies_are_found(monkeypatch):
    """The negative control: writing that need not wait for the forward makes XLA copy the caches."""
    monkeypatch.setattr(prefill, "default_chunk", lambda: 16)
    monkeypatch.setattr(kv, "_wait_for", lambda start, after: start)
    layer = h.CONFIG.num_kv_heads * h.CONFIG.head_dim * CAPACITY
    _, lowered = lowered_run(h.plain_loop(), h.all_params(), 1)
    assert large_copies(compiled(lowered).as_text(), layer)


# One pure function


PROMPTS = h.prompts_of([5, 1, 9, 12])


@pytest.fixture(scope="module")
def pure():
    """`make_generate`'s function, its arguments and the expected text."""
    generate = make_generate(h.TARGET, LmDrafter(h.TARGET, 3), max_new_tokens=12)
    sampling = h.sampling_of(
        4, max_new_tokens=12, temperature=[0.0, 1.0, 0.7, 1.0], top_k=[0, 5, 0, 0], top_p=0.9
    )
    ids = jnp.arange(4, dtype=jnp.int32)
    args = (h.all_params(lm=h.close_params()), *h.pad(PROMPTS), sampling, ids)
    want = h.decode(
        h.plain_loop(), h.all_params(), PROMPTS, dataclasses.replace(sampling), capacity=28
    )
    jitted = jax.jit(generate)
    return SimpleNamespace(jitted=jitted, args=args, want=want.tokens)


def emitted(out):
    text = jax.device_get(out[0])
    return [text.tokens[i, len(p) : text.length[i]].tolist() for i, p in enumerate(PROMPTS)]


def test_generate_under_jit_and_ahead_of_time(pure):
    ahead = pure.jitted.lower(*pure.args).compile()
    assert emitted(ahead(*pure.args)) == pure.want
    out = pure.jitted(*pure.args)
    assert emitted(out) == pure.want
    assert out[1].rounds.shape == (4,)


def test_generate_is_exported_and_read_back(pure):
    pytest.importorskip("flatbuffers")
    exported = export.export(pure.jitted)(*pure.args)
    again = export.deserialize(exported.serialize())
    assert emitted(again.call(*pure.args)) == pure.want


def test_generate_on_two_devices(pure):
    """Rows spread over a mesh give the text that one device gives."""
    if jax.device_count() < 2:
        pytest.skip("one device only")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, *batch = pure.args
    placed = jax.device_put(tuple(batch), rows)
    out = pure.jitted(jax.device_put(params, everywhere), *placed)
    assert emitted(out) == pure.want
    assert out[0].tokens.sharding.spec == PartitionSpec("data")


# The pipeline's programs


@pytest.fixture
def compiles():
    """Programs that XLA compiles, by the events of JAX itself."""
    count = collections.Counter()

    def listen(event, duration, **_):
        count[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count["/jax/core/compile/backend_compile_duration"]
    jax.monitoring.unregister_event_duration_listener(listen)


def decoder_of(drafter=None, params=None, config=h.CONFIG):
    target = Target(Decoder(config), h.target_params(), None, Path())
    loaded = LoadedDrafter(drafter or NoDrafter(), params or {}, "test")
    return SpeculativeDecoder(target, loaded)


def test_programs_are_few(compiles):
    """Any mixture of prompt lengths, limits and sampling parameters runs the same two programs."""
    decoder = decoder_of(MaxGram(4))
    rng = np.random.default_rng(0)

    def run(lengths, **fields):
        prompts = [rng.integers(0, h.VOCAB, n).tolist() for n in lengths]
        return list(decoder.generate(prompts, batch_size=2, **fields))

    run([5, 9], max_new_tokens=8)
    assert decoder.compilations == 2 and decoder.compile_time_s > 0
    before = compiles()
    assert before > 0, "the counter does not count"
    for lengths in ([1, 2], [60, 3], [33, 34], [7], [100, 1, 40]):
        run(lengths, max_new_tokens=int(rng.integers(1, 20)), temperature=0.8, top_k=3, seed=7)
    run([1, 50], max_new_tokens=[3, 70], temperature=[0.0, 1.0], top_p=[0.5, 1.0], ignore_eos=True)
    assert decoder.compilations == 2
    assert compiles() == before
    # Another capacity is another pair, and all prompts up to the context need no more than these.
    run([1, 128], max_new_tokens=100)
    run([200, 1], max_new_tokens=30)
    assert decoder.compilations == 4
    assert sorted({decoder.capacity(n, m) for n in range(1, 512) for m in (1, 64, 900)}) == [
        128,
        256,
        512,
    ]


@pytest.mark.slow  # ten thousand tokens
def test_memory_does_not_grow():
    """Two thousand tokens again and again leave nothing behind."""
    config = dataclasses.replace(h.CONFIG, context=2100)
    decoder = decoder_of(MaxGram(4), config=config)

    def run():
        chunks = []
        answer = next(
            decoder.generate(
                [[1, 2, 3]],
                max_new_tokens=2000,
                temperature=1.0,
                on_chunk=chunks.append,
                rounds_per_chunk=200,
            )
        )
        assert answer.stats.num_tokens == 2000
        assert sum(len(c.token_ids) for c in chunks) == 2000
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays()), resident_bytes()

    run()
    live, resident = run()
    for _ in range(2):
        after = run()
    assert after[0] == live
    assert after[1] < resident + (8 << 20)


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
