"""The XLA back-end of tree attention: the suite, its blocks, and no copies of a cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import TreeAttentionSuite, make_case, slow
from hlo import compiled
from jax import lax

from pallas_kernels import _xla, tree_attention


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


@pytest.fixture
def other(monkeypatch):
    """Sets a constant of the back-end, which keeps what it has traced with the usual ones."""

    def patch(name, value):
        monkeypatch.setattr(_xla, name, value)
        _xla.attend.clear_cache()

    yield patch
    _xla.attend.clear_cache()


class TestXla(TreeAttentionSuite):
    backend = "xla"

    @pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 2.0}])
    @pytest.mark.parametrize("lengths", [(0, 130, 300), (300,)])
    def test_blocked(self, other, options, lengths):
        other("MAX_SCORE_BYTES", 1 << 14)
        # 100 new tokens: more than a block of them, and a cache that is no multiple of a block.
        self.check(make_case(t=100, chain=True, lengths=lengths), explicit=False, salt=1, **options)
        self.check(make_case(t=100, lengths=lengths), salt=1, **options)

    @pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 2.0}])
    @pytest.mark.parametrize("t", [1, 7])
    def test_large_caches(self, other, t, options):
        """On CPU, rows of whole blocks and a rest; the last block would reach past the cache."""
        other("LARGE_ROW", 0)
        other("CPU_BLOCK", 128)
        for lengths in ((0, 130, 300), (256, 257, 1), (300,), (128,)):
            self.check(make_case(t=t, lengths=lengths), salt=3, **options)

    def test_whole_batch(self, other):
        """What accelerators run where a CPU goes row by row."""
        other("MIN_QUERIES_BY_ROW", 1 << 20)
        self.check(make_case(t=20), salt=2, window=50)

    def test_scores_are_bounded(self):
        """A prefill of 512 tokens on a long cache: 8 heads of scores would take 537 MB."""
        shapes = [(1, 512, 8, 64), *[(1, 512, 2, 64)] * 2, *[(1, 2, 1 << 15, 64)] * 2]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = jax.jit(lambda *x: tree_attention(*x, backend="xla"))
        program = compiled(run.lower(*args, jax.ShapeDtypeStruct((1,), jnp.int32)))
        assert program.memory_analysis().temp_size_in_bytes < 4 * _xla.MAX_SCORE_BYTES

    @pytest.mark.parametrize("stacked", [False, True])
    @pytest.mark.parametrize(
        ("b", "t", "slots"),
        [
            *((1, 1, 1024), (1, 8, 4096), (3, 16, 1024)),
            *(slow(1, 8, 1024), slow(3, 1, 1024), slow(3, 16, 4096)),
        ],
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
        lowered = jax.jit(loop, donate_argnums=1).lower(
            jax.ShapeDtypeStruct((b, t, k, d), jnp.float32),
            ((cache, cache),) * (1 if stacked else layers),
            jax.ShapeDtypeStruct((b,), jnp.int32),
        )
        hlo = compiled(lowered).as_text()
        assert "conditional(" in hlo and "while(" in hlo
        assert not whole_copies(hlo, np.prod(cache_shape), cache_shape)
