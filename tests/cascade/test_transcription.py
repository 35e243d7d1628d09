"""Cascades against a plain transcription of the algorithm."""

import dataclasses

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest
from cascades import CASCADES, all_logits, params, three_levels
from test_drafters import best_match, copied

from jax_specdec import DecodeLoop
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram


@dataclasses.dataclass(frozen=True)
class Counted(LmDrafter):
    """Counts its verifications of each row."""

    def init(self, batch, capacity):
        return {**super().init(batch, capacity), f"{self.name}#": jnp.zeros((batch,), jnp.int32)}

    def verify(self, params, states, ctx, drafted, count):
        logits, states = super().verify(params, states, ctx, drafted, count)
        done = states[f"{self.name}#"] + ctx.active.astype(jnp.int32)
        return logits, {**states, f"{self.name}#": done}


def counted(drafter):
    """The same with every verifier counting."""
    if isinstance(drafter, Horizontal | Cascade):
        drafter = dataclasses.replace(drafter, drafters=tuple(map(counted, drafter.drafters)))
    if isinstance(drafter, Cascade):
        lm = drafter.verifier
        drafter = dataclasses.replace(drafter, verifier=Counted(lm.decoder, lm.length, lm.name))
    return drafter


class Plain:
    """One row, greedy, no caches; counts the forwards of every model."""

    def __init__(self, weights):
        self.weights, self.forwards = weights, dict.fromkeys(weights, 0)

    def laws(self, name, text):
        """The model's law after each token of the text; one forward."""
        self.forwards[name] += 1
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(text)] = text
        logits = np.asarray(all_logits(h.TARGET, self.weights[name], jnp.asarray(tokens)))
        chance = np.exp(logits - logits.max(-1, keepdims=True))
        return chance[: len(text)] / chance[: len(text)].sum(-1, keepdims=True)

    def propose(self, drafter, text, room):
        """The tokens behind the text, and the proposer's probability of each, None for none."""
        if isinstance(drafter, MaxGram):
            end = best_match(text, 1, None, "latest")
            tokens = [] if end is None else copied(text, end, drafter.length)
            return tokens, [None] * len(tokens)
        if isinstance(drafter, Horizontal):
            return self.horizontal(drafter, text, room)
        draft, q = self.horizontal(drafter.inner, text, room - 1)
        copies = drafter.copies
        if copies is None:
            copies = all(isinstance(d, MaxGram) for d in drafter.drafters)
        return self.review(drafter.verifier.info.name, text, draft, q, drafter.lenience, copies)

    def horizontal(self, drafter, text, room):
        draft, q, budget = [], [], 0
        for part, more in zip(drafter.drafters, drafter.budgets, strict=True):
            budget += more
            while len(draft) < min(budget, room):
                new, chance = self.propose(part, text + draft, room - len(draft))
                draft, q = draft + new, q + chance
                if drafter.cut:
                    draft, q = draft[:budget], q[:budget]
                if not new:
                    break
        return draft, q

    def review(self, name, text, draft, q, lenience, copies):
        laws = self.laws(name, text + draft)[len(text) - 1 :]
        out, chance = [], []
        for law, token, other in zip(laws, draft, q, strict=False):
            bound = 1.0 if other is None else other
            near = lenience > 1 and (copies or other is not None) and law[token] * lenience > bound
            if token != law.argmax() and not near:
                break
            out.append(token)
            chance.append(law[token])
        law = laws[len(out)]
        return [*out, int(law.argmax())], [*chance, law.max()]

    def decode(self, drafter, prompt, new):
        text, end = list(prompt), len(prompt) + new
        while len(text) < end:
            room = end - len(text)
            draft, q = self.propose(drafter, text, room)
            text += self.review("target", text, draft[:room], q, 1.0, False)[0]
            text = text[:end]
        return text[len(prompt) :]


TRANSCRIBED = {
    "vicuna": CASCADES["vicuna"],
    "three levels": CASCADES["three levels"],
    "cut": dataclasses.replace(three_levels(), cut=True),
    "lenient": three_levels(lenience=3.0),
    "lenient to copies": CASCADES["lenient"],
}


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_against_a_transcription(name):
    """The same tokens and as many forwards at every level, one row at a time."""
    drafter = TRANSCRIBED[name]
    given = {k: v for k, v in params().items() if k != "bigram"}
    total = 0
    for seed in range(3):
        prompt = h.prompts_of((9,), seed)[0]
        plain = Plain({"target": h.target_params(), **given})
        want = plain.decode(drafter, prompt, 24)
        loop = DecodeLoop(h.TARGET, counted(drafter))
        got = h.decode(loop, h.all_params(**given), [prompt], h.sampling_of(1))
        assert got.tokens[0] == want
        forwards = {"target": int(got.stats.rounds[0]), "lm": 0, "lm2": 0}
        for key, state in got.state.drafts.items():
            if key.endswith("#"):
                forwards[key[:-1]] += int(state[0])
        assert forwards == plain.forwards
        total += forwards["lm"]
    assert total > 10
