"""Rotary embeddings in `config.json`, in both directions."""

import math
from typing import Any

from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig, RopeConfig

Json = dict[str, Any]
_ORIGINAL = "original_max_position_embeddings"
# What each kind must have.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_ropes(hf: Json, family: str, partial: bool) -> Json:
    """The fields `rope` and `local_rope` of a `config.json`, defaults of its family filled in.

    transformers 5 writes `rope_parameters`; older versions wrote `rope_theta` and `rope_scaling`. Where
    two places disagree transformers is followed: all of `rope_scaling` wins over `rope_parameters`, and
    an `original_max_position_embeddings` beside them over one inside.

    Args:
      partial: whether models of this family may rotate a part of each head.

    Raises:
      UserError: a kind that is not supported, or one that lacks a parameter.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key) or {}, dict):
            raise UserError(f"config.json must give {key} as an object, not {hf[key]!r:.80}.")
    if family == "gemma3_text":
        given = hf.get("rope_parameters") or {}
        full = {**(given.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
        local = given.get("sliding_attention") or {}
        theta, near = hf.get("rope_theta") or 1e6, hf.get("rope_local_base_freq") or 1e4
        return {
            "rope": _read(full, hf, theta, partial),
            "local_rope": _read(local, hf, near, partial),
        }
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("Rotary embeddings that differ between layers are not supported.")
    if family == "phi3" and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
        rope = {**rope, "rope_type": "longrope"}  # as they were once called
    return {"rope": _read(rope, hf, hf.get("rope_theta") or 10_000.0, partial)}


def _read(rope: Json, hf: Json, theta: float, partial: bool) -> RopeConfig:
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0) and not partial:
        raise UserError(
            "Partial rotary embeddings (partial_rotary_factor) are not supported in models of this type."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise UserError(
            f"Rotary embeddings of type {kind!r:.80} are not supported; {', '.join(_NEEDED)} are."
        )
    missing = [key for key in _NEEDED[kind] if key not in rope]
    if missing:
        raise UserError(f"config.json's {kind} rotary embedding lacks {' and '.join(missing)}.")
    fields: Json = {
        "theta": float(rope.get("rope_theta") or theta),
        "kind": kind,
        "partial": 1.0 if share is None else float(share),
    }
    longest = hf["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        beside, inside = hf.get(_ORIGINAL), rope.get(_ORIGINAL, longest)
        fields["original_context"] = int(inside if beside is None else beside)
    if kind == "dynamic":
        fields["original_context"] = int(longest)
    if kind == "llama3":
        fields |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
    if kind != "default":
        factor = rope.get("factor")
        fields["factor"] = float(
            longest / fields.get("original_context", longest) if factor is None else factor
        )
    if kind == "longrope":
        for key in ("short", "long"):
            fields[f"{key}_factors"] = tuple(float(x) for x in rope[f"{key}_factor"])
    if kind == "yarn":
        fields["beta_fast"] = float(rope.get("beta_fast") or 32)
        fields["beta_slow"] = float(rope.get("beta_slow") or 1)
        fields["truncate"] = bool(rope.get("truncate", True))
    if kind in ("yarn", "longrope"):
        given, usual = rope.get("attention_factor"), _attention_factor(fields, rope)
        if given is None or math.isclose(given, usual, rel_tol=1e-7):  # a GGUF file has float32
            given = usual
        fields["attention_factor"] = float(given)
    return RopeConfig(**fields)


def _attention_factor(fields: Json, rope: Json) -> float:
    """What cosines and sines are multiplied by unless the file says it."""
    factor = fields["factor"]
    if factor <= 1:
        return 1.0
    if fields["kind"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(fields["original_context"]))

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    near, far = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(near) / of(far) if near and far else of(1)


def write_ropes(c: ModelConfig) -> Json:
    """The keys of `config.json`; `read_ropes` gives the rotary embeddings back."""
    if c.rope is None:
        return {}
    rope = _write(c.rope)
    if c.local_rope is not None:
        return {
            "rope_parameters": {"full_attention": rope, "sliding_attention": _write(c.local_rope)}
        }
    if c.rope.kind == "longrope":
        return {"rope_parameters": rope, _ORIGINAL: c.rope.original_context}
    return {"rope_parameters": rope}


def _write(rope: RopeConfig) -> Json:
    out: Json = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.partial != 1:
        out["partial_rotary_factor"] = rope.partial
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        out[_ORIGINAL] = rope.original_context
    if rope.kind == "llama3":
        out["low_freq_factor"] = rope.low_freq_factor
        out["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        out |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "truncate")}
    if rope.kind == "longrope":
        out["short_factor"] = list(rope.short_factors)
        out["long_factor"] = list(rope.long_factors)
    if rope.kind in ("yarn", "longrope"):
        out["attention_factor"] = rope.attention_factor
    return out
