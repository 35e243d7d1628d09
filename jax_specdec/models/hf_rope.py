"""Rotary embeddings in `config.json`, in both directions."""

from typing import Any

from jax_specdec.errors import UserError
from jax_specdec.models.config import RopeConfig


def read_rope(hf: dict[str, Any]) -> RopeConfig:
    """The rotary embedding of a `config.json`, defaults of its family filled in.

    transformers 5 writes `rope_parameters`; older versions wrote `rope_theta` and `rope_scaling`. Where
    two places disagree transformers is followed: all of `rope_scaling` wins over `rope_parameters`, and
    an `original_max_position_embeddings` beside them over one inside.

    Raises:
      UserError: a kind that is not supported, or one that lacks a parameter.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("Rotary embeddings that differ between layers are not supported.")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("Partial rotary embeddings (partial_rotary_factor) are not supported.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", hf.get("rope_theta")) or 10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"Rotary embeddings of type {kind!r:.80} are not supported; default, linear and llama3 are."
        )
    keys = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    missing = [key for key in keys if key not in rope]
    if missing:
        raise UserError(f"config.json's {kind} rotary embedding lacks {' and '.join(missing)}.")
    fields: dict[str, Any] = {key: float(rope[key]) for key in keys}
    if kind == "llama3":
        key = "original_max_position_embeddings"
        beside = hf.get(key)
        inside = rope.get(key, hf["max_position_embeddings"])
        fields["original_context"] = int(inside if beside is None else beside)
    return RopeConfig(theta=theta, kind=kind, **fields)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters`; `read_rope` gives `rope` back."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind == "llama3":
        out["low_freq_factor"] = rope.low_freq_factor
        out["high_freq_factor"] = rope.high_freq_factor
        out["original_max_position_embeddings"] = rope.original_context
    return out
