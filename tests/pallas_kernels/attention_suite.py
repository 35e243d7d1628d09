"""Cases of tree attention, the expected values, and the suite that every back-end inherits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import tree_attention

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


QUICK_HEADS = ((1, 64), (4, 80), (7, 128))


def slow(*values):
    """A case that is like another one but for its shape."""
    return pytest.param(*values, marks=pytest.mark.slow)


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
        [
            *(*QUICK_HEADS, (8, 96), (1, 256), (8, 256)),
            *(
                slow(*x)
                for x in itertools.product((1, 4, 7), (64, 80, 128))
                if x not in QUICK_HEADS
            ),
        ],
    )
    def test_heads(self, g, d):
        self.check(make_case(t=5, g=g, d=d))

    @pytest.mark.parametrize("t", [1, slow(2), 32, 33, slow(64), 128])
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

    @pytest.mark.parametrize("t", [1, slow(7), 40])
    def test_no_ancestors_is_a_chain(self, t):
        case = make_case(t=t, chain=True)
        self.check(case, explicit=False)
        for x, y in zip(self.call(case, explicit=False), self.call(case), strict=True):
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("window", [1, slow(2), 4, 130, slow(1000)])
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

    @pytest.mark.parametrize("t", [1, slow(8), 20])
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
