"""One drafter of each kind with its parameters, over the tiny target of `helpers`, by name."""

import dataclasses
import functools
from typing import Any

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig

LM = LmDrafter(h.TARGET, 3)


@functools.cache
def glide() -> tuple[GliDe, Any]:
    """A GliDe drafter that agrees with the target now and then."""
    fields = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
    shape = GliDeConfig(**{name: getattr(h.CONFIG, name) for name in fields})
    model, target = GliDe(shape, h.CONFIG), h.target_params()
    with jax.ensure_compile_time_eval():
        own = model.init(jax.random.key(5))
        near = h.perturbed({"layers": target["layers"], "norm": target["norm"]}, 0.15)
        blocks = zip(near["layers"], own["layers"], strict=True)
        layers = tuple({**block, "cross": other["cross"]} for block, other in blocks)
        return model, model.join({**own, **near, "layers": layers}, target)


@functools.cache
def medusa() -> tuple[Medusa, Any]:
    """Heads of random weights, which share the target's output matrix."""
    model, target = Medusa(MedusaConfig(num_heads=3), h.CONFIG), h.target_params()
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        own = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1, s.dtype), model.shapes()
        )
        return model, model.join(own, target)


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """`(drafter, parameters)` by name."""
    lm = {"lm": h.close_params()}
    if name == "none":
        return NoDrafter(), {}
    if name == "max-gram":
        return MaxGram(4), {}
    if name == "lm":
        return LM, lm
    if name == "lm+tree":
        return Expand(LM, DynamicTree(12)), lm
    if name == "lm[max-gram]":
        return Cascade(LM, (MaxGram(3),), (3,)), lm
    if name == "glide+cape":
        model, params = glide()
        return Expand(GliDeDrafter(model, 3), Cape(12)), {"glide": params}
    assert name == "medusa"
    model, params = medusa()
    return MedusaDrafter(model, 3), {"medusa": params}


@dataclasses.dataclass(frozen=True)
class Forgetless(LmDrafter):
    """Breaks the contract: a new request finds the state of the one before."""

    def reset(self, states, rows):
        del rows
        return states
