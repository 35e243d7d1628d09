"""Lossless speculative decoding of large language models in JAX."""

from importlib.metadata import PackageNotFoundError, version

from jax_specdec.checkpoints import Target, convert, load_target, memory_plan, save_pretrained
from jax_specdec.drafters.base import Drafter, Outcome, TargetView
from jax_specdec.drafters.loading import LoadedDrafter, load_drafter
from jax_specdec.errors import RunError, UserError
from jax_specdec.loop import DecodeLoop, make_generate
from jax_specdec.models.config import ModelConfig, RopeConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.pipeline import Generation, SpeculativeDecoder
from jax_specdec.sampling import Sampling, make_sampling
from jax_specdec.tree import Draft, Text

try:
    __version__ = version("jax-specdec")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "DecodeLoop",
    "Decoder",
    "Draft",
    "Drafter",
    "Generation",
    "LoadedDrafter",
    "ModelConfig",
    "Outcome",
    "RopeConfig",
    "RunError",
    "Sampling",
    "SpeculativeDecoder",
    "Target",
    "TargetView",
    "Text",
    "UserError",
    "convert",
    "load_drafter",
    "load_target",
    "make_generate",
    "make_sampling",
    "memory_plan",
    "save_pretrained",
]
