"""The target: a decoder of chosen parts, and its Hugging Face configuration."""

from jax_specdec.models.config import ModelConfig, RopeConfig
from jax_specdec.models.decoder import Decoder, stack_layers, unstack_layers
from jax_specdec.models.hf import config_from_hf, config_to_hf

__all__ = [
    "Decoder",
    "ModelConfig",
    "RopeConfig",
    "config_from_hf",
    "config_to_hf",
    "stack_layers",
    "unstack_layers",
]
