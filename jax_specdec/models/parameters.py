"""The parameters of a decoder: name, shape and logical axes of each, from its configuration alone.

Initialisation, sharding, checkpoints and counts all read these tables. Matrices are `[in, out]`.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax_specdec.models.config import ModelConfig


class Parameter(NamedTuple):
    """One array.

    Attributes:
      axes: a logical name for each axis, see `core.model.Model.axes`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def layer_parameters(c: "ModelConfig", experts: bool) -> dict[str, Parameter]:
    """The parameters of one layer, by name.

    Args:
      experts: whether it is a mixture.
    """
    embed, dim = c.hidden_size, c.head_dim
    heads, keys = c.num_heads * dim, c.num_kv_heads * dim
    found: dict[str, Parameter] = {}

    def matrix(
        name: str, rows: tuple[str, int], columns: tuple[str | None, int], bias: bool = False
    ) -> None:
        found[name] = Parameter((rows[1], columns[1]), (rows[0], columns[0]))
        if bias:
            found[f"{name}_bias"] = Parameter((columns[1],), (columns[0],))

    def norm(name: str) -> None:
        found[name] = Parameter((embed,), ("embed",))
        if c.norm == "layer":
            found[f"{name}_bias"] = found[name]

    before, behind = c.norms in ("pre", "both"), c.norms in ("post", "both")
    if before:
        norm("attention_norm")
    matrix("qkv", ("embed", embed), ("heads", heads + 2 * keys), c.qkv_bias)
    if c.qk_norm and c.wide_qk_norm:
        found["q_norm"] = Parameter((heads,), ("heads",))
        found["k_norm"] = Parameter((keys,), ("heads",))
    elif c.qk_norm:
        found["q_norm"] = found["k_norm"] = Parameter((dim,), (None,))
    matrix("out", ("heads", heads), ("embed", embed), c.out_bias)
    if behind:
        norm("attention_out_norm")
    if before:
        norm("mlp_norm")
    width = 2 if c.gated else 1
    if experts:
        count, size = c.num_experts, c.expert_size
        matrix("router", ("embed", embed), (None, count))
        found["experts_up"] = Parameter((count, embed, width * size), (None, "embed", "mlp"))
        found["experts_down"] = Parameter((count, size, embed), (None, "mlp", "embed"))
    else:
        up = "gate_up" if c.gated else "up"
        matrix(up, ("embed", embed), ("mlp", width * c.mlp_size), c.mlp_bias)
        matrix("down", ("mlp", c.mlp_size), ("embed", embed), c.mlp_bias)
    if behind:
        norm("mlp_out_norm")
    return found


def model_parameters(c: "ModelConfig") -> dict[str, Parameter]:
    """What is not in a layer, by name."""
    embed = c.hidden_size
    found = {"embed": Parameter((c.vocab_size, embed), ("vocab", "embed"))}
    if c.learned_positions:
        found["positions"] = Parameter((c.learned_positions, embed), (None, "embed"))
    found["norm"] = Parameter((embed,), ("embed",))
    if c.norm == "layer":
        found["norm_bias"] = found["norm"]
    if not c.tied_head:
        found["head"] = Parameter((embed, c.vocab_size), ("embed", "vocab"))
    return found


def shape_at(c: "ModelConfig", path: tuple[str | int, ...]) -> tuple[int, ...]:
    """The shape of one layer's array by its path in the tree, `("layers", 3, "qkv")` or `("layers", "qkv")`."""
    if len(path) == 1:
        return model_parameters(c)[str(path[0])].shape
    layer = path[1] if isinstance(path[1], int) else 0
    return layer_parameters(c, c.has_experts(layer))[str(path[-1])].shape
