"""Lossless speculative decoding of large language models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import RunError, UserError

if TYPE_CHECKING:
    from jax_specdec import plots
    from jax_specdec.checkpoints.memory import memory_plan
    from jax_specdec.checkpoints.targets import Target, convert, load_target, save_pretrained
    from jax_specdec.conversation import Conversation
    from jax_specdec.core.acceptance import LossyTypical, Match, Reject
    from jax_specdec.core.budget import RoundCosts
    from jax_specdec.core.context import Context, TargetView
    from jax_specdec.core.draft import Draft, Text
    from jax_specdec.core.drafter import Drafter, Info, ModelUse, Outcome, Verifier
    from jax_specdec.core.generate import make_generate
    from jax_specdec.core.loop import DecodeLoop
    from jax_specdec.core.model import Model, Output
    from jax_specdec.core.sampling import Sampling, make_sampling
    from jax_specdec.core.sharding import Sharding, ShardingRules
    from jax_specdec.drafters.cascade import Cascade, Horizontal
    from jax_specdec.drafters.first import First
    from jax_specdec.expansions.beam_search import BeamSearch
    from jax_specdec.expansions.cape import Cape
    from jax_specdec.expansions.dynamic_tree import DynamicTree
    from jax_specdec.expansions.expand import Expand
    from jax_specdec.expansions.siblings import Fixed, PathProbability
    from jax_specdec.expansions.static_tree import StaticTree
    from jax_specdec.generation import Generation, Request
    from jax_specdec.loading import load
    from jax_specdec.models.config import ModelConfig, RopeConfig
    from jax_specdec.models.decoder import Decoder
    from jax_specdec.models.glide import GliDe
    from jax_specdec.models.glide_config import GliDeConfig
    from jax_specdec.models.medusa import Medusa, MedusaConfig
    from jax_specdec.pipeline import SpeculativeDecoder
    from jax_specdec.specs.build import LoadedDrafter, load_drafter
    from jax_specdec.specs.defaults import default_spec
    from jax_specdec.streaming import Piece, Stream
    from jax_specdec.training.api import train_glide, train_lm, train_medusa, train_vocabulary

    __version__: str

# Where each public name lives. They are imported on first use, so that `jax-specdec --help` and its
# errors of wrong use do not wait for jax.
_HOMES = {
    "checkpoints.targets": ("Target", "convert", "load_target", "save_pretrained"),
    "checkpoints.memory": ("memory_plan",),
    "conversation": ("Conversation",),
    "core.acceptance": ("LossyTypical", "Match", "Reject"),
    "core.context": ("Context", "TargetView"),
    "core.drafter": ("Drafter", "Info", "ModelUse", "Outcome", "Verifier"),
    "core.model": ("Model", "Output"),
    "drafters.cascade": ("Cascade", "Horizontal"),
    "drafters.first": ("First",),
    "expansions.beam_search": ("BeamSearch",),
    "expansions.cape": ("Cape",),
    "expansions.dynamic_tree": ("DynamicTree",),
    "expansions.expand": ("Expand",),
    "expansions.siblings": ("Fixed", "PathProbability"),
    "specs.build": ("LoadedDrafter", "load_drafter"),
    "specs.defaults": ("default_spec",),
    "expansions.static_tree": ("StaticTree",),
    "core.budget": ("RoundCosts",),
    "core.generate": ("make_generate",),
    "core.loop": ("DecodeLoop",),
    "models.config": ("ModelConfig", "RopeConfig"),
    "models.decoder": ("Decoder",),
    "models.glide": ("GliDe",),
    "models.glide_config": ("GliDeConfig",),
    "models.medusa": ("Medusa", "MedusaConfig"),
    "generation": ("Generation", "Request"),
    "loading": ("load",),
    "streaming": ("Piece", "Stream"),
    "pipeline": ("SpeculativeDecoder",),
    "core.sampling": ("Sampling", "make_sampling"),
    "core.sharding": ("Sharding", "ShardingRules"),
    "core.draft": ("Draft", "Text"),
    "training.api": ("train_glide", "train_lm", "train_medusa", "train_vocabulary"),
}

__all__ = [
    "BeamSearch",
    "Cape",
    "Cascade",
    "Context",
    "Conversation",
    "DecodeLoop",
    "Decoder",
    "Draft",
    "Drafter",
    "DynamicTree",
    "Expand",
    "First",
    "Fixed",
    "Generation",
    "GliDe",
    "GliDeConfig",
    "Horizontal",
    "Info",
    "LoadedDrafter",
    "LossyTypical",
    "Match",
    "Medusa",
    "MedusaConfig",
    "Model",
    "ModelConfig",
    "ModelUse",
    "Outcome",
    "Output",
    "PathProbability",
    "Piece",
    "Reject",
    "Request",
    "RopeConfig",
    "RoundCosts",
    "RunError",
    "Sampling",
    "Sharding",
    "ShardingRules",
    "SpeculativeDecoder",
    "StaticTree",
    "Stream",
    "Target",
    "TargetView",
    "Text",
    "UserError",
    "Verifier",
    "convert",
    "default_spec",
    "load",
    "load_drafter",
    "load_target",
    "make_generate",
    "make_sampling",
    "memory_plan",
    "plots",
    "save_pretrained",
    "train_glide",
    "train_lm",
    "train_medusa",
    "train_vocabulary",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("jax-specdec")
        except PackageNotFoundError:  # run from a source tree that is not installed
            value = "0+unknown"
    elif name == "plots":
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
