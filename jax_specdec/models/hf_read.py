"""Values of a `config.json`, checked: what families read in common."""

import math
from typing import Any, NoReturn

from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig

Json = dict[str, Any]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def refuse(message: str) -> NoReturn:
    """Raises a `UserError`."""
    raise UserError(message)


def size(hf: Json, key: str) -> int:
    """A positive integer."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json must give {key} as a positive integer, not {value!r:.80}.")
    return value


def number(hf: Json, key: str, default: float | None = 0.0) -> Any:
    """A positive number; the default where the key is left out or null."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        return None
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not whole or not (value > 0 and math.isfinite(value)):
        raise UserError(f"config.json must give {key} as a number above 0, not {value!r:.80}.")
    return float(value)


def flag(hf: Json, key: str) -> bool:
    """Truth; false where the key is left out or null."""
    return bool(hf.get(key))


def integers(hf: Json, key: str, values: Any, count: int | None = None) -> list[int]:
    """A list of integers, `count` of them unless that is None."""
    listed = isinstance(values, list) and all(isinstance(i, int) for i in values)
    if not listed or (count is not None and len(values) != count):
        many = "" if count is None else f"{count} "
        raise UserError(f"config.json must give {key} as a list of {many}integers.")
    return values


def token_id(hf: Json, key: str) -> int | None:
    """One token id, or none."""
    value = hf.get(key)
    if value is not None and type(value) is not int:
        raise UserError(f"config.json must give {key} as a token id, not {value!r:.80}.")
    return value


def token_ids(hf: Json, file: str, key: str) -> tuple[int, ...] | None:
    """Token ids, one or a list; None where there is no such key."""
    value = hf.get(key)
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(
            f"{file} must give {key} as a token id or a list of them, not {value!r:.80}."
        )
    return tuple(ids)


def bias_flags(hf: Json) -> Json:
    """Biases of all of attention's projections, or of none."""
    bias = flag(hf, "attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def activation(hf: Json) -> str:
    """The MLP's, by our name."""
    named = hf.get("hidden_act") or "silu"
    if not isinstance(named, str) or named not in ACTIVATIONS:
        raise UserError(
            f"The activation {named!r:.80} is not supported; {', '.join(ACTIVATIONS)} are."
        )
    return ACTIVATIONS[named]


def window_of(hf: Json) -> int | None:
    """The sliding window in tokens, where there is one."""
    return None if hf["sliding_window"] is None else size(hf, "sliding_window")


def used_window(hf: Json) -> int | None:
    """The sliding window where `use_sliding_window` asks for it."""
    return window_of(hf) if hf.get("use_sliding_window") else None


def windows_by_type(hf: Json, types: Any, window: int | None) -> tuple[int | None, ...]:
    """The window of each layer from its type."""
    count = hf["num_hidden_layers"]
    if len(types) != count:
        raise UserError(
            f"config.json lists {len(types)} layer_types for {count} layers (num_hidden_layers)."
        )
    types = ["full_attention" if t == "attention" else t for t in types]  # the old spelling
    unknown = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UserError(f"Layers of type {unknown[0]!r:.80} are not supported (layer_types).")
    if window is None and "sliding_attention" in types:
        raise UserError(
            "config.json has layers of sliding attention (layer_types) and no sliding_window for them."
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def layer_types(c: ModelConfig) -> tuple[list[int], list[str]]:
    """The windows that there are, and the type of each layer."""
    sizes = [w for w in c.windows if w is not None]
    return sizes, ["full_attention" if w is None else "sliding_attention" for w in c.windows]
