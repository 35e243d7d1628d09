"""The tree attention op: one suite that every back-end inherits, and what is particular to each."""

import functools
import itertools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import BACKENDS, _triton, _xla, masks, tree_attention, tuning

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def random_tree(rng, t):
    """bool[T, T]: ancestors-or-self of a random tree whose node 0 is the root."""
    seen = np.eye(t, dtype=bool)
    for i in range(1, t):
        seen[i] |= seen[rng.integers(0, i)]
    return seen


def pack(seen):
    """An independent packing: bool[..., T] -> int32[..., W]."""
    t = seen.shape[-1]
    words = np.zeros((*seen.shape[:-1], -(-t // 32)), np.uint32)
    for j in range(t):
        words[..., j // 32] |= seen[..., j].astype(np.uint32) << np.uint32(j % 32)
    return words.view(np.int32)


def expected(case, *, scale=None, soft_cap=None, window=None):
    """Attention in float64, one query at a time over the keys that it sees and no others."""
    if "k_scale" in case:
        whole = {x: case[x].astype(np.float64) for x in ("k_cache", "v_cache")}
        for x, by in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
            whole[x] *= case[by].astype(np.float64)[:, None, None]
        case = case | whole
    q, length = case["q"].astype(np.float64), case["length"]
    b, t, n, d = q.shape
    k = case["k_cache"].shape[1]
    out, lse = np.zeros(q.shape), np.full((b, t, n), -np.inf)
    for row in range(b):
        for i in range(t):
            slots = np.arange(length[row])
            if case.get("visible") is not None:
                slots = slots[slots < case["visible"][row, i]]
                if window is not None:
                    slots = slots[slots >= case["visible"][row, i] - window]
            nodes = np.zeros(0, int)
            if case["k_new"] is not None:
                seen = case["seen"][row]
                depth = seen.sum(-1) - 1
                nodes = np.flatnonzero(seen[i])
                if window is not None:
                    slots = slots[slots > length[row] + depth[i] - window]
                    nodes = nodes[depth[nodes] > depth[i] - window]
            if not slots.size + nodes.size:
                continue
            keys, values = case["k_cache"][row][:, slots], case["v_cache"][row][:, slots]
            if nodes.size:
                keys = np.concatenate([keys, case["k_new"][row, nodes].swapaxes(0, 1)], 1)
                values = np.concatenate([values, case["v_new"][row, nodes].swapaxes(0, 1)], 1)
            for head in range(n):
                kv = head // (n // k)
                x = keys[kv].astype(np.float64) @ q[row, i, head]
                x = x * (d**-0.5 if scale is None else scale)
                if soft_cap is not None:
                    x = soft_cap * np.tanh(x / soft_cap)
                weights = np.exp(x - x.max())
                lse[row, i, head] = x.max() + np.log(weights.sum())
                out[row, i, head] = weights @ values[kv].astype(np.float64) / weights.sum()
    return out, lse


def make_case(
    *, t, g=2, d=64, lengths=(0, 130, 300), slots=300, k=2, chain=False, dtype="float32", seed=0
):
    rng = np.random.default_rng(seed)
    b, kind = len(lengths), np.dtype(getattr(ml_dtypes, dtype, dtype))

    def normal(*shape):
        return rng.normal(size=shape).astype(kind)

    case = {
        "q": normal(b, t, k * g, d) * kind.type(2),
        "k_new": normal(b, t, k, d),
        "v_new": normal(b, t, k, d),
        "k_cache": normal(b, k, slots, d),
        "v_cache": normal(b, k, slots, d),
        "length": np.array(lengths, np.int32),
    }
    # What lies past the end must not matter, whatever it is.
    for row, length in enumerate(lengths):
        case["k_cache"][row, :, length:] = np.nan
        case["v_cache"][row, :, length::2] = np.nan
        case["v_cache"][row, :, length + 1 :: 2] = np.inf
    if chain:
        case["seen"] = np.broadcast_to(np.tril(np.ones((t, t), bool)), (b, t, t))
    else:
        case["seen"] = np.stack([random_tree(rng, t) for _ in range(b)])
    return case


def cache_only(case, visible=None):
    return case | {"k_new": None, "v_new": None, "visible": visible}


def quantised(case, seed=0):
    """The case with int8 caches; what lies past the end is any number."""
    rng = np.random.default_rng(seed)
    caches = {
        x: rng.integers(-127, 128, case[x].shape).astype(np.int8) for x in ("k_cache", "v_cache")
    }
    k = case["k_cache"].shape[1]
    scales = {x: rng.uniform(0.005, 0.03, k).astype(np.float32) for x in ("k_scale", "v_scale")}
    return case | caches | scales


ARRAYS = ("q", "k_new", "v_new", "k_cache", "v_cache", "length")


@functools.partial(jax.jit, static_argnames=("backend", "interpret", "options", "salt"))
def run(arrays, layer, backend, interpret, options, salt):
    """One jitted function for the module, so that equal shapes compile once.

    `salt` keeps apart what was traced under changed module constants.
    """
    options = dict(options) | {"layer": layer, "backend": backend, "interpret": interpret}
    return tree_attention(**arrays, **options, return_lse=True)


class TreeAttentionSuite:
    """What every back-end must satisfy. A subclass names its back-end."""

    backend: str | None
    interpret: Any = False

    def call(self, case, *, explicit=True, layer=None, salt=None, **options):
        """The op, jitted, on a case's arrays; `explicit` passes the ancestors as a bitmask."""
        arrays = {x: case[x] for x in ARRAYS}
        arrays |= {x: case.get(x) for x in ("visible", "k_scale", "v_scale")}
        if explicit and case["k_new"] is not None:
            arrays["ancestors"] = pack(case["seen"])
        arrays = jax.tree.map(jnp.asarray, arrays)
        return run(arrays, layer, self.backend, self.interpret, tuple(options.items()), salt)

    def check(self, case, *, explicit=True, salt=None, **options):
        out, lse = self.call(case, explicit=explicit, salt=salt, **options)
        assert out.dtype == case["q"].dtype and out.shape == case["q"].shape
        assert lse.dtype == jnp.float32 and lse.shape == case["q"].shape[:3]
        want, want_lse = expected(case, **options)
        tolerance = TOLERANCE[case["q"].dtype.name]
        error = np.abs(np.asarray(out, np.float64) - want).max() / max(np.abs(want).max(), 1e-30)
        assert error < tolerance
        seen = np.isfinite(want_lse)
        assert (np.isneginf(np.asarray(lse)) == ~seen).all()
        worst = np.abs(np.asarray(lse, np.float64)[seen] - want_lse[seen]).max(initial=0)
        assert worst < tolerance * max(np.abs(want_lse[seen]).max(initial=0), 1)

    @pytest.mark.parametrize(
        ("g", "d"),
        [*itertools.product((1, 4, 7), (64, 80, 128)), (8, 96), (1, 256), (8, 256)],
    )
    def test_heads(self, g, d):
        self.check(make_case(t=5, g=g, d=d))

    @pytest.mark.parametrize("t", [1, 2, 32, 33, 64, 128])
    def test_tree_sizes(self, t):
        self.check(make_case(t=t, seed=t))

    @pytest.mark.parametrize(
        "lengths", [(0, 0, 0), (0, 1, 2), (127, 128, 129), (256, 255, 257), (300, 299, 300)]
    )
    @pytest.mark.parametrize("t", [3, 16])
    def test_lengths(self, lengths, t):
        self.check(make_case(t=t, lengths=lengths))

    def test_one_row(self):
        self.check(make_case(t=7, lengths=(200,)))

    def test_small_cache(self):
        self.check(make_case(t=7, slots=24, lengths=(0, 11, 24)))

    @pytest.mark.parametrize("t", [1, 7, 40])
    def test_no_ancestors_is_a_chain(self, t):
        case = make_case(t=t, chain=True)
        self.check(case, explicit=False)
        for x, y in zip(self.call(case, explicit=False), self.call(case), strict=True):
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("window", [1, 2, 4, 130, 1000])
    @pytest.mark.parametrize("chain", [False, True])
    def test_window(self, window, chain):
        self.check(make_case(t=12, chain=chain), explicit=not chain, window=window)

    def test_soft_cap_and_scale(self):
        self.check(make_case(t=9), soft_cap=3.0, scale=0.3)

    @pytest.mark.parametrize("t", [1, 20])
    def test_cache_only(self, t):
        self.check(cache_only(make_case(t=t)))

    @pytest.mark.parametrize("t", [1, 20])
    def test_visible(self, t):
        visible = np.random.default_rng(1).integers(0, 200, (3, t)).astype(np.int32)
        visible[1, 0] = 0
        self.check(cache_only(make_case(t=t), visible))
        for window in (1, 40, 1000):
            self.check(cache_only(make_case(t=t), visible), window=window)

    def test_node_that_sees_nothing(self):
        case = make_case(t=4)
        case["seen"][:, 2] = False
        out, lse = self.call(case)
        assert (np.asarray(out)[0, 2] == 0).all() and np.isneginf(np.asarray(lse)[0, 2]).all()
        self.check(case)

    @pytest.mark.parametrize("t", [1, 8, 20])
    def test_bfloat16(self, t):
        self.check(make_case(t=t, g=4, dtype="bfloat16"))

    @pytest.mark.parametrize("t", [1, 9])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_int8(self, t, dtype):
        self.check(quantised(make_case(t=t, g=4, dtype=dtype)))

    def test_int8_cache_only(self):
        self.check(cache_only(quantised(make_case(t=5))))

    def test_without_the_log_sum_exp(self):
        case = make_case(t=5)
        arrays = {x: jnp.asarray(case[x]) for x in ARRAYS}
        arrays["ancestors"] = jnp.asarray(pack(case["seen"]))
        options = {"backend": self.backend, "interpret": self.interpret}
        out = jax.jit(functools.partial(tree_attention, **options))(**arrays)
        np.testing.assert_allclose(out, self.call(case)[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("traced", [False, True])
    def test_layer(self, traced):
        case = make_case(t=9)
        plain = self.call(case)
        stacked = dict(case)
        for name in ("k_cache", "v_cache"):
            stacked[name] = np.stack([np.full_like(case[name], np.nan), case[name]])
        if traced:
            layered = self.call(stacked, layer=jnp.int32(1))
        else:
            arrays = {x: jnp.asarray(stacked[x]) for x in ARRAYS}
            arrays["ancestors"] = jnp.asarray(pack(case["seen"]))
            options = {"backend": self.backend, "interpret": self.interpret}
            op = functools.partial(tree_attention, layer=1, return_lse=True, **options)
            layered = jax.jit(lambda arrays: op(**arrays))(arrays)
        for x, y in zip(layered, plain, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


class TestReference(TreeAttentionSuite):
    backend = "reference"

    def test_float64(self):
        case = make_case(t=9, dtype="float64")
        with jax.enable_x64(True):
            out, _ = self.call(case)
        want, _ = expected(case)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-13)


class TestXla(TreeAttentionSuite):
    backend = "xla"

    @pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 2.0}])
    @pytest.mark.parametrize("lengths", [(0, 130, 300), (300,)])
    def test_blocked(self, monkeypatch, options, lengths):
        monkeypatch.setattr(_xla, "MAX_SCORE_BYTES", 1 << 14)
        # 100 new tokens: more than a block of them, and a cache that is no multiple of a block.
        self.check(make_case(t=100, chain=True, lengths=lengths), explicit=False, salt=1, **options)
        self.check(make_case(t=100, lengths=lengths), salt=1, **options)

    @pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 2.0}])
    @pytest.mark.parametrize("t", [1, 7])
    def test_large_caches(self, monkeypatch, t, options):
        """On CPU, rows of whole blocks and a rest; the last block would reach past the cache."""
        monkeypatch.setattr(_xla, "LARGE_ROW", 0)
        monkeypatch.setattr(_xla, "CPU_BLOCK", 128)
        for lengths in ((0, 130, 300), (256, 257, 1), (300,), (128,)):
            self.check(make_case(t=t, lengths=lengths), salt=3, **options)

    def test_whole_batch(self, monkeypatch):
        """What accelerators run where a CPU goes row by row."""
        monkeypatch.setattr(_xla, "MIN_QUERIES_BY_ROW", 1 << 20)
        self.check(make_case(t=20), salt=2, window=50)

    def test_scores_are_bounded(self):
        """A prefill of 512 tokens on a long cache: 8 heads of scores would take 537 MB."""
        shapes = [(1, 512, 8, 64), *[(1, 512, 2, 64)] * 2, *[(1, 2, 1 << 15, 64)] * 2]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = jax.jit(lambda *x: tree_attention(*x, backend="xla"))
        compiled = run.lower(*args, jax.ShapeDtypeStruct((1,), jnp.int32)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * _xla.MAX_SCORE_BYTES

    @pytest.mark.parametrize("stacked", [False, True])
    @pytest.mark.parametrize(
        ("b", "t", "slots"),
        [(1, 1, 1024), (1, 8, 1024), (3, 1, 1024), (3, 16, 1024), (1, 8, 4096), (3, 16, 4096)],
    )
    def test_no_copy_of_a_cache_in_a_decoding_loop(self, b, t, slots, stacked):
        layers, k, d = 3, 2, 64
        cache_shape = (b, k, slots, d)
        if stacked:
            cache_shape = (layers, *cache_shape)

        def step(x, caches, length):
            new = []
            for i in range(layers):
                k_new, v_new = x * 0.5, x * 0.9
                k_cache, v_cache = caches[0 if stacked else i]
                layer = jnp.int32(i) if stacked else None
                x = x + tree_attention(
                    x, k_new, v_new, k_cache, v_cache, length, layer=layer, backend="xla"
                )
                new.append((k_new, v_new))
            # The commit waits for the verification: what it writes, and where, depends on it.
            node = jnp.argmax(jnp.sum(x, axis=(2, 3)), axis=1).astype(jnp.int32)
            token = jnp.argmax(x.reshape(b, -1), axis=1).astype(jnp.int32)
            length = length + (token >= 0).astype(jnp.int32)
            caches = list(caches)
            for i in range(layers):
                for row in range(b):
                    at = (jnp.int32(row), jnp.int32(0), length[row], jnp.int32(0))
                    if stacked:
                        at = (jnp.int32(i), *at)
                    where = 0 if stacked else i
                    written = []
                    for cache, update in zip(caches[where], new[i], strict=True):
                        update = lax.dynamic_index_in_dim(update[row], node[row])
                        update = update.reshape((1,) * (cache.ndim - 3) + (k, 1, d))
                        written.append(lax.dynamic_update_slice(cache, update, at))
                    caches[where] = tuple(written)
            return x, tuple(caches), length

        def loop(x, caches, length):
            def more(state):
                return jnp.max(state[2]) < slots - 1

            return lax.while_loop(more, lambda state: step(*state), (x, caches, length))

        cache = jax.ShapeDtypeStruct(cache_shape, jnp.float32)
        hlo = (
            jax.jit(loop, donate_argnums=1)
            .lower(
                jax.ShapeDtypeStruct((b, t, k, d), jnp.float32),
                ((cache, cache),) * (1 if stacked else layers),
                jax.ShapeDtypeStruct((b,), jnp.int32),
            )
            .compile()
            .as_text()
        )
        assert "conditional(" in hlo and "while(" in hlo
        assert not whole_copies(hlo, np.prod(cache_shape), cache_shape)


class _Interpreted(TreeAttentionSuite):
    """A Pallas back-end in its interpreter, with blocks small enough that these cases have many."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        small = tuning.TpuConfig(heads=2, keys=64, rows=32, chunk=32)
        monkeypatch.setattr(tuning, "tpu", lambda *_: small)
        monkeypatch.setattr(tuning, "gpu", lambda *_: tuning.GpuConfig(keys=32, rows=32))
        monkeypatch.setattr(tuning, "multiprocessors", lambda: 24)


class TestMosaicTpu(_Interpreted):
    backend = "mosaic_tpu"
    interpret = True


class TestMosaicTpuMachine:
    """The interpreter that models the TPU: copies, semaphores, memory that nobody has written."""

    suite = type("_Machine", (TestMosaicTpu,), {"__test__": False})()
    suite.interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    _small_blocks = _Interpreted._small_blocks

    def check(self, case, **options):
        self.suite.check(case, **options)
        assert not races()

    @pytest.mark.parametrize("lengths", [(0, 1, 300), (64, 127, 129)])
    def test_lengths(self, lengths):
        self.check(make_case(t=9, lengths=lengths))

    @pytest.mark.parametrize("explicit", [False, True])
    def test_window(self, explicit):
        self.check(make_case(t=12, chain=not explicit), explicit=explicit, window=70)

    def test_large_tree(self):
        self.check(make_case(t=40, g=1, d=128, k=1), soft_cap=3.0)

    def test_visible(self):
        visible = np.random.default_rng(1).integers(0, 200, (3, 5)).astype(np.int32)
        self.check(cache_only(make_case(t=5), visible))

    def test_bfloat16(self):
        self.check(make_case(t=5, g=4, dtype="bfloat16"))

    def test_int8(self):
        self.check(quantised(make_case(t=5, dtype="bfloat16")))


def races():
    """Whether the interpreter has seen a race in its last run."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    return found is not None and found.races_found


class TestTriton(_Interpreted):
    backend = "triton"
    interpret = True

    @pytest.mark.parametrize("splits", [1, 3, 64])
    def test_splits(self, monkeypatch, splits):
        """One kernel where there is one split; else a second, which takes more than it holds at a time."""
        monkeypatch.setattr(tuning, "multiprocessors", lambda: 6 * splits)
        monkeypatch.setattr(_triton, "TOGETHER", 4)
        self.check(make_case(t=5), salt=(3, splits))
        self.check(make_case(t=33, g=3, d=80), salt=(3, splits), window=90)
        self.check(quantised(make_case(t=5)), salt=(3, splits))


def whole_copies(hlo, size, shape):
    """HLO instructions that copy `size` elements, or that write a `shape` other than in place."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?(%\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if not match:
            continue
        name, dims, opcode = match.groups()
        dims = tuple(int(x) for x in dims.split(","))
        if np.prod(dims) < size:
            continue
        moves = opcode in {"copy", "slice", "dynamic-slice", "transpose", "concatenate"}
        # The largest bucket zeroes the dead slots of a whole layer's values: a select.
        inplace = "dynamic-update-slice" in name or "dynamic_update_slice" in name
        writes = opcode == "fusion" and dims == shape and not inplace and "select" not in name
        if moves or writes:
            found.append(line.strip()[:200])
    return found


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 70])
def test_masks(size):
    seen = np.random.default_rng(size).random((2, 3, size)) < 0.5
    bits = masks.pack(jnp.asarray(seen))
    assert bits.dtype == jnp.int32
    np.testing.assert_array_equal(bits, pack(seen))
    np.testing.assert_array_equal(masks.unpack(bits, size), seen)
    np.testing.assert_array_equal(masks.popcount(bits), seen.sum(-1))
    chain = masks.unpack(masks.chain(size), size)
    np.testing.assert_array_equal(chain, np.tril(np.ones((size, size), bool)))


def test_unpack_too_many():
    with pytest.raises(ValueError, match=r"33 bits do not fit.*\(2, 1\)"):
        masks.unpack(jnp.zeros((2, 1), jnp.int32), 33)


def test_automatic_backend_is_said_once(caplog):
    case = make_case(t=3, slots=77, lengths=(5,))
    arrays = {x: case[x] for x in ARRAYS}
    with caplog.at_level(logging.DEBUG, logger="pallas_kernels"):
        for _ in range(2):
            out = jax.eval_shape(lambda arrays: tree_attention(**arrays), arrays)
    assert out.shape == case["q"].shape
    said = [x.getMessage() for x in caplog.records if x.name.startswith("pallas_kernels")]
    assert len(said) == 1 and "xla" in said[0]


GOOD = {
    "q": ((2, 5, 4, 8), "float32"),
    "k_new": ((2, 5, 2, 8), "float32"),
    "v_new": ((2, 5, 2, 8), "float32"),
    "k_cache": ((2, 2, 16, 8), "float32"),
    "v_cache": ((2, 2, 16, 8), "float32"),
    "length": ((2,), "int32"),
}
INT8 = {
    "k_cache": ((2, 2, 16, 8), "int8"),
    "v_cache": ((2, 2, 16, 8), "int8"),
    "k_scale": ((2,), "float32"),
    "v_scale": ((2,), "float32"),
}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": ((2, 5, 32), "float32")}, {}, r"q must be \[B, T, N, D\], got \(2, 5, 32\)"),
        ({"q": ((2, 5, 3, 8), "float32")}, {}, r"\(2, 5, 3, 8\).*\(2, 2, 16, 8\)"),
        ({"q": ((2, 5, 4, 6), "float32")}, {}, r"\(2, 5, 4, 6\).*\(2, 2, 16, 8\)"),
        ({"k_new": ((2, 4, 2, 8), "float32")}, {}, r"k_new must be \(2, 5, 2, 8\).*\(2, 4, 2, 8\)"),
        ({"v_new": None}, {}, "both or neither"),
        ({"v_cache": ((2, 2, 17, 8), "float32")}, {}, r"\(2, 2, 16, 8\).*\(2, 2, 17, 8\)"),
        ({"length": ((3,), "int32")}, {}, r"length must be int32\(2,\).*\(3,\)"),
        ({"length": ((2,), "float32")}, {}, r"length must be int32"),
        ({"ancestors": ((2, 5, 2), "int32")}, {}, r"ancestors must be int32\(2, 5, 1\)"),
        ({"v_new": ((2, 5, 2, 8), "bfloat16")}, {}, "one floating dtype.*v_new bfloat16"),
        ({}, {"layer": 0}, r"with layer the caches must be \[L, B, K, S, D\]"),
        ({"k_new": None, "v_new": None}, {"window": 3}, "window"),
        ({"visible": ((2, 5), "int32")}, {}, "visible"),
        ({"k_new": None, "v_new": None, "ancestors": ((2, 5, 1), "int32")}, {}, "ancestors"),
        ({}, {"window": 0}, "window must be at least 1"),
        ({}, {"soft_cap": 0.0}, "soft_cap must be positive"),
        ({}, {"backend": "cuda"}, "'cuda' does not exist; there are 'reference', 'xla'"),
        ({}, {"backend": "triton"}, "'triton' needs a GPU, and this is cpu"),
        ({}, {"backend": "mosaic_tpu"}, "'mosaic_tpu' needs a TPU, and this is cpu"),
        ({}, {"backend": "xla", "interpret": True}, "'xla' has no interpreter"),
        ({}, {"interpret": True}, "interpret needs a backend"),
        ({"k_scale": ((2,), "float32")}, {}, "both or neither"),
        (
            {"k_scale": ((2,), "float32"), "v_scale": ((2,), "float32")},
            {},
            "int8 caches, not of float32",
        ),
        (
            INT8 | {"k_scale": ((3,), "float32")},
            {},
            r"k_scale must be float32\(2,\).*\(3,\)",
        ),
        (
            {"k_cache": ((2, 2, 16, 8), "int8"), "v_cache": ((2, 2, 16, 8), "int8")},
            {},
            "int8 caches go",
        ),
    ],
)
def test_errors(change, options, message):
    arrays = {
        name: None if spec is None else jax.ShapeDtypeStruct(*spec)
        for name, spec in (GOOD | change).items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: tree_attention(**arrays, **options), arrays)


def test_every_backend_has_a_suite():
    suites = [*TreeAttentionSuite.__subclasses__(), *_Interpreted.__subclasses__()]
    tested = {getattr(x, "backend", None) for x in suites}
    assert set(BACKENDS) <= tested
