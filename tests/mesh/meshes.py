"""The small target of `helpers` and its drafters, on meshes of simulated devices."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_specdec import Decoder, make_generate
from jax_specdec.core.sharding import Sharding, put_rows
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.first import First
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.models.tensor_parallel import divide

BATCH, NEW = 8, 10
PROMPTS = h.prompts_of([5, 1, 9, 12, 4, 7, 3, 8])
TEMPERATURES = [0.0, 1.0, 0.7, 1.0, 0.0, 0.0, 1.0, 1.5]
DRAFTERS = ("none", "lm", "glide+cape", "cascade", "first", "medusa")


def mesh_of(data: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"))


def sampling():
    return h.sampling_of(BATCH, temperature=TEMPERATURES, max_new_tokens=NEW)


@functools.cache
def glide_params():
    shape = GliDeConfig.like(h.CONFIG)
    return shape, h.perturbed(GliDe(shape, h.CONFIG).init(jax.random.key(3)), 0.5)


def case(name: str, sharding: Sharding):
    """(target, drafter, parameters) on a mesh."""
    target = Decoder(h.CONFIG, sharding=sharding)
    params = divide(h.target_params(), h.CONFIG, target)
    small = Decoder(h.CONFIG, sharding=sharding.replicated)
    close = divide(h.close_params(), h.CONFIG, small)
    own = {}
    if name == "none":
        drafter = None
    elif name == "lm":
        drafter, own = LmDrafter(small, 3), {"lm": close}
    elif name == "cascade":
        drafter, own = Cascade(LmDrafter(small, 1), (MaxGram(4),), (4,)), {"lm": close}
    elif name == "first":
        drafter = First((MaxGram(4, min_match=2), LmDrafter(small, 3)))
        own = {"lm": close}
    elif name == "medusa":
        model = Medusa(MedusaConfig(num_heads=3), target.config)
        drafter, own = MedusaDrafter(model, 3), {"medusa": model.join(model.init(params), params)}
    else:
        shape, weights = glide_params()
        model = GliDe(shape, target.config, sharding=sharding)
        weights = jax.device_put(weights, model.places())
        drafter = Expand(GliDeDrafter(model, 4), Cape(12))
        own = {"glide": model.join(weights, params)}
    return target, drafter, {"target": params, "drafters": own}


def program(name: str, sharding: Sharding):
    """The compiled decoding of a case, and its arguments."""
    target, drafter, params = case(name, sharding)
    generate = make_generate(target, drafter, max_new_tokens=NEW)
    rows = put_rows((*h.pad(PROMPTS), sampling(), jnp.arange(BATCH, dtype=jnp.int32)), sharding)
    args = (params, *rows)
    return jax.jit(generate).lower(*args).compile(), args


def texts(name: str, sharding: Sharding) -> list[list[int]]:
    compiled, args = program(name, sharding)
    text = jax.device_get(compiled(*args)[0])
    return [text.tokens[i, len(p) : text.length[i]].tolist() for i, p in enumerate(PROMPTS)]


@functools.cache
def plain() -> list[list[int]]:
    """What one device writes without drafters and meshes."""
    return h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling(), capacity=16 + NEW).tokens
