"""One checkpoint of each family: speculative text is plain text, which is that of transformers' `generate`."""

import dataclasses
import functools

import helpers as h
import numpy as np
import pytest
from test_families import CASES, folder, golden, load, make, told  # noqa: F401 (a fixture)

from jax_specdec import DecodeLoop
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig

ANSWERED = [case for case in CASES if case in make["CONTROLS"]]
CAPACITY = 32
# A greedy row, whose text is known, and sampled ones of other lengths.
SAMPLING = h.sampling_of(3, temperature=(0.0, 1.0, 0.7), max_new_tokens=(6, 8, 4))


def drafter_of(kind, target):
    """A drafter for a target, and the parameters of its parts."""
    decoder = target.decoder
    lm, close = LmDrafter(decoder, 3), {"lm": h.perturbed(target.params, 0.02)}
    if kind == "lm":
        return lm, close
    if kind == "max-gram":
        return MaxGram(4), {}
    if kind == "cascade":
        return Cascade(dataclasses.replace(lm, length=1), (MaxGram(3),), (3,)), close
    if kind == "medusa":
        model = Medusa(MedusaConfig(num_heads=2), target.config)
        return MedusaDrafter(model, 2), {
            "medusa": model.join(model.init(target.params), target.params)
        }
    model = GliDe(GliDeConfig.like(target.config), target.config)
    drafts = {"glide": model.join(h.weights(model, 5), target.params)}
    return Expand(GliDeDrafter(model, 3), Cape(8)), drafts


@functools.cache
def plain(where, case):
    target = load(where, case)
    tokens = golden(case)[1]
    prompts = [tokens[0, : told(case)[0]].tolist(), tokens[1, :5].tolist(), tokens[1, 3:4].tolist()]
    loop = h.plain_loop(target=target.decoder)
    params = h.all_params(target=target.params)
    return target, prompts, h.decode(loop, params, prompts, SAMPLING, capacity=CAPACITY)


@pytest.mark.parametrize("kind", ["lm", "max-gram", "glide+cape", "cascade", "medusa"])
@pytest.mark.parametrize("case", ANSWERED)
def test_text_is_plain_text(case, kind, folder):  # noqa: F811
    target, prompts, want = plain(folder(case), case)
    _, tokens, _ = golden(case)
    start = told(case)[0]
    assert want.tokens[0] == tokens[0, start : start + 6].tolist()
    drafter, drafts = drafter_of(kind, target)
    params = h.all_params(target=target.params, **drafts)
    loop = DecodeLoop(target.decoder, drafter, margins=True)
    got = h.decode(loop, params, prompts, SAMPLING, capacity=CAPACITY)
    h.assert_identical(got, want)
    if kind == "lm":
        assert np.sum(got.stats.accepted) > 0
