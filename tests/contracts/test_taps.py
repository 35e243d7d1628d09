"""A drafter that reads hidden states of the target: what it is handed, in the prompt and in rounds."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, Decoder
from jax_specdec.core.confidence import chain_fields
from jax_specdec.core.context import Tapped
from jax_specdec.core.draft import chain
from jax_specdec.core.drafter import chain_info, rollback
from jax_specdec.core.numerics import argmax
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import stack_layers
from jax_specdec.testing import check_drafter

CONFIG = dataclasses.replace(h.CONFIG, num_layers=3, windows=())
TAPS = (-1, 0, 1)  # the embedding and two inner layers
PROMPTS = h.prompts_of([5, 1, 9, 12], seed=6)
TEMPERATURES = [0.0, 1.0, 0.7, 1.4]


@dataclasses.dataclass(frozen=True)
class TapDrafter:
    """Drafts from the taps of the last position that is known, one linear layer for each depth.

    Its state is what it was handed: `seen [B, S, 3 E]` and `length`, the positions that it holds.
    """

    width: int
    length: int = 3
    name: str = "tapping"

    @property
    def info(self):
        return chain_info(self.name, self.length, taps=TAPS, distribution=True)

    def init(self, batch, capacity):
        seen = jnp.zeros((batch, capacity, len(TAPS) * self.width), jnp.float32)
        return {self.name: (seen, jnp.zeros((batch,), jnp.int32))}

    def reset(self, states, rows):
        seen, length = states[self.name]
        return {**states, self.name: (seen, jnp.where(rows, 0, length))}

    def at(self, view, visible):
        return jnp.concatenate([view.tap(tap, visible) for tap in TAPS], axis=-1)

    def extend(self, params, states, ctx):
        del params
        seen, length = states[self.name]
        place = jnp.arange(seen.shape[1], dtype=jnp.int32)[None]
        visible = jnp.minimum(place + 1, ctx.view.length[:, None])
        new = (place >= length[:, None]) & (place < ctx.view.length[:, None])
        seen = jnp.where(new[..., None], self.at(ctx.view, visible), seen)
        return {**states, self.name: (seen, jnp.maximum(length, ctx.view.length))}

    def draft(self, params, states, ctx):
        states = self.extend(params, states, ctx)
        weights, embed = params[self.name]
        hidden = self.at(ctx.view, ctx.view.length[:, None])
        root = jnp.take(embed, ctx.text.root(), axis=0)[:, None]
        here = jnp.concatenate([hidden, root], axis=-1)
        logits = jnp.einsum("bte,pef,vf->bpv", here, weights, embed)
        scores = ctx.scores(logits)
        chosen = ctx.perturbed(scores, 0, "matched", self.length)
        tokens, scores = argmax(chosen), scores if ctx.return_q else chosen
        return chain(ctx.text, tokens, **chain_fields(scores, tokens, ctx)), states

    def commit(self, states, outcome):
        seen, length = states[self.name]
        return {**states, self.name: (seen, rollback(length, outcome))}


def target(layer_loop):
    return Decoder(CONFIG, layer_loop=layer_loop)


@functools.cache
def weights():
    """Parameters of the target, and random ones of the drafter with the target's embedding."""
    rng = np.random.default_rng(0)
    params = h.weights(target("unroll"), 2)
    width = CONFIG.hidden_size
    with jax.ensure_compile_time_eval():
        own = rng.normal(size=(3, (len(TAPS) + 1) * width, width)) * 0.5
        return params, (jnp.asarray(own, jnp.float32), params["embed"])


def all_params(layer_loop):
    params, own = weights()
    params = stack_layers(params) if layer_loop == "scan" else params
    return {"target": params, "drafters": {"tapping": own}}


DRAFTERS = {
    "chain": TapDrafter(CONFIG.hidden_size),
    "cape": Expand(TapDrafter(CONFIG.hidden_size), Cape(20)),
}


def decode(drafter, layer_loop):
    loop = DecodeLoop(target(layer_loop), drafter)
    sampling = h.sampling_of(4, temperature=TEMPERATURES, seed=9)
    return h.decode(loop, all_params(layer_loop), PROMPTS, sampling)


@pytest.fixture(scope="module")
def plain():
    sampling = h.sampling_of(4, temperature=TEMPERATURES, seed=9)
    loop = h.plain_loop(target=target("unroll"))
    return h.decode(loop, all_params("unroll"), PROMPTS, sampling)


@functools.cache
def forward(layer_loop):
    model = target(layer_loop)

    @jax.jit
    def hidden(params, tokens):
        line = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(line, tokens.shape)
        tapped = model.apply(params, tokens, positions, taps=TAPS, logits=False).taps
        return jnp.concatenate([tapped[tap] for tap in TAPS], axis=-1)

    return hidden


def assert_handed_the_text(got, layer_loop):
    """What was recorded in prompt and rounds is one forward over the final text."""
    seen, held = got.state.drafts["tapping"]
    params = all_params(layer_loop)["target"]
    want = np.asarray(forward(layer_loop)(params, jnp.asarray(got.text)))
    for row, prompt in enumerate(PROMPTS):
        # The last round emits up to four tokens that no draft was made behind.
        assert len(prompt) + 24 - 5 <= held[row] < len(prompt) + 24
        np.testing.assert_allclose(
            seen[row, : held[row]], want[row, : held[row]], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_taps_are_hidden_states_of_the_text(name, layer_loop, plain):
    got = decode(DRAFTERS[name], layer_loop)
    h.assert_identical(got, plain)
    assert_handed_the_text(got, layer_loop)
    # Siblings are accepted, too, so that the kept rows are not the first ones of a round.
    assert (got.stats.accepted.sum(axis=0)[1:] > 0).all()


def test_taps_of_the_wrong_nodes_are_found(plain, monkeypatch):
    """The negative control: the first rows of a round in place of those on the accepted path."""
    right = Tapped.commit

    def wrong(self, cache, output, count, path=None):
        taken = right(self, cache, output, count, None).taps
        return right(self, cache, output, count, path).replace(taps=taken)

    monkeypatch.setattr(Tapped, "commit", wrong)
    drafter = Expand(TapDrafter(CONFIG.hidden_size), Cape(21))  # another program
    got = decode(drafter, "unroll")
    h.assert_identical(got, plain)  # lossless all the same
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_handed_the_text(got, "unroll")


def test_it_keeps_the_contract():
    params = all_params("unroll")
    check_drafter(DRAFTERS["chain"], params["drafters"], target("unroll"), params["target"])


def test_unknown_taps_are_refused():
    model, params = target("unroll"), all_params("unroll")["target"]
    tokens = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="are not among -1 to 2"):
        model.apply(params, tokens, tokens, taps=(3,))
