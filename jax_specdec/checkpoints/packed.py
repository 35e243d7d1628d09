"""Quantized safetensors, turned into float32 while they are read: FP8 and int8 with scales, GPTQ, AWQ.

Values are the packages' own to the last bit: a product of a stored number and a stored scale, in float32. What a
package does to activations at run time is left out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_specdec.checkpoints.tensor_files import NARROW, RowView, Stored, Views, read_json
from jax_specdec.errors import UserError, shown

Tensors = dict[str, Stored]
_SCALES = (".weight_scale_inv", ".weight_scale")
# Beside weights: of activations and caches, which are not rounded here.
_LEFT_OUT = (".input_scale", ".output_scale", ".input_scale_ub", ".weight_shape")
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point
# The output column of each nibble of a word, low bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a checkpoint's weights are stored.

    Attributes:
      name: for people.
      unpack: gives the tensors that those of the files stand for.
    """

    name: str
    unpack: Callable[[Path, Tensors], Tensors]


def read_packing(file: Path) -> Packing | None:
    """What a config.json says, or the hf_quant_config.json beside it; None for plain weights.

    Raises:
      UserError: a way that is not supported.
    """
    about = read_json(file).get("quantization_config") if file.is_file() else None
    beside = file.with_name("hf_quant_config.json")
    if about is None and beside.is_file():
        found = read_json(beside).get("quantization")
        about = {"quant_method": "modelopt", **found} if isinstance(found, dict) else None
    if about is None:
        return None
    method = about.get("quant_method", "an unnamed method") if isinstance(about, dict) else about
    make = _METHODS.get(method) if isinstance(about, dict) and isinstance(method, str) else None
    if make is None:
        raise _refusal(f"{method!s:.80}")
    return make(about)


def _refusal(what: str) -> UserError:
    known = "FP8 and int8 with scales, GPTQ and AWQ are"
    return UserError(
        f"This checkpoint is quantized ({what}), which is not supported; {known}, or use the original."
    )


def _scaled(about: Mapping[str, Any]) -> Packing:
    """DeepSeek's, Meta's and modelopt's FP8."""
    method = about["quant_method"]
    algorithm = about.get("quant_algo", "FP8")
    if method == "modelopt" and algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        raise _refusal(f"modelopt, {algorithm!s:.80}")
    block = about.get("weight_block_size")
    if block is None and algorithm == "FP8_PB_WO":
        block = (128, 128)
    return _with_scales(f"{method}", block)


def _compressed(about: Mapping[str, Any]) -> Packing:
    """compressed-tensors: 8 bits, a scale for each tensor, row or block."""
    groups = about.get("config_groups")
    ways = list(groups.values()) if isinstance(groups, dict) else []
    weights = [way.get("weights") if isinstance(way, dict) else None for way in ways]
    if about.get("transform_config") or not weights:
        raise _refusal("compressed-tensors with transforms, or of no groups")
    blocks = []
    for way in weights:
        if not isinstance(way, dict) or way.get("num_bits") != 8 or not way.get("symmetric", True):
            bits = way.get("num_bits") if isinstance(way, dict) else None
            raise _refusal(f"compressed-tensors, {about.get('format')!s:.60}, {bits!s:.20} bits")
        blocks.append(way.get("block_structure"))
    return _with_scales("compressed-tensors", blocks[0])


def _with_scales(name: str, block: Any) -> Packing:
    if block is not None:
        two = isinstance(block, (list, tuple)) and len(block) == 2
        if not two or not all(map(_is_size, block)):
            raise UserError(f"Blocks of a weight must be two sizes, not {shown(block)}.")
        block = block[0], block[1]

    def unpack(folder: Path, tensors: Tensors) -> Tensors:
        views, plain = Views(), {}
        for key, stored in tensors.items():
            base, _, last = key.rpartition(".")
            view = stored.view()
            if view.get_dtype() in (*NARROW, "I8") and last == "weight":
                scale = next((tensors[base + s] for s in _SCALES if base + s in tensors), None)
                views[key] = _scaled_view(folder, key, view, scale, block)
            elif not key.endswith((*_SCALES, *_LEFT_OUT)):
                plain[key] = stored
        return plain | views.stored()

    return Packing(name, unpack)


def _scaled_view(
    folder: Path, key: str, view: Any, stored: Stored | None, block: tuple[int, int] | None
) -> RowView:
    """`weight * scale`: one scale, one of each row, or one of each block."""
    shape = tuple(view.get_shape())
    scale_shape = () if stored is None else tuple(stored.view().get_shape())
    one, rows = scale_shape in ((), (1,), (1, 1)), scale_shape in ((shape[0],), (shape[0], 1))
    blocks = ()
    if block is not None and len(shape) == 2:
        blocks = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    if stored is None or not (one or rows or scale_shape == blocks):
        raise UserError(
            f"{folder} has no scale that fits {key:.120} of shape {shape}: {scale_shape}."
        )

    def read(start: int, stop: int) -> np.ndarray:
        scale = np.asarray(stored.view()[...]).astype(np.float32)
        part = np.asarray(view[start:stop]).astype(np.float32)
        if one:
            return part * scale.reshape(())
        if rows:
            return part * scale.reshape(-1, *[1] * (len(shape) - 1))[start:stop]
        assert block is not None
        across = np.repeat(scale[np.arange(start, stop) // block[0]], block[1], axis=1)
        return part * across[:, : shape[1]]

    return RowView(shape, "F32", read)


def _gptq(about: Mapping[str, Any]) -> Packing:
    bits, form = about.get("bits"), about.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or form not in _GPTQ_FORMATS or about.get("dynamic"):
        raise _refusal(f"GPTQ of {bits!s:.20} bits in the format {form!s:.40}")
    shifts = np.arange(0, 32, bits, dtype=np.int32)
    return _in_words(f"GPTQ of {bits} bits", about, bits, shifts, _GPTQ_FORMATS[form], down=True)


def _awq(about: Mapping[str, Any]) -> Packing:
    bits, form = about.get("bits", about.get("w_bit")), about.get("version", "gemm")
    if bits != 4 or str(form).lower() != "gemm" or about.get("zero_point") is False:
        raise _refusal(f"AWQ of {bits!s:.20} bits in the version {form!s:.40}")
    shifts = 4 * np.argsort(_AWQ_ORDER).astype(np.int32)
    return _in_words("AWQ of 4 bits", about, 4, shifts, 0, down=False)


def _in_words(
    name: str, about: Mapping[str, Any], bits: int, shifts: np.ndarray, added: int, *, down: bool
) -> Packing:
    """Weights `[in, out]` in words of 32 bits: `(word's part - zero point) * scale`, both of a group of inputs.

    Args:
      shifts: of a word's parts, in the order of their rows or columns. added: to each zero point.
      down: whether a word holds rows, and not columns. Zero points are packed along columns always.
    """
    size = about.get("group_size", about.get("q_group_size", -1))
    if size != -1 and not _is_size(size):
        raise UserError(f"group_size must be a positive number or -1, not {shown(size)}.")
    each, mask = len(shifts), (1 << bits) - 1

    def unpack(folder: Path, tensors: Tensors) -> Tensors:
        views, plain = Views(), dict(tensors)
        for key in tensors:
            base, _, last = key.rpartition(".")
            if last != "qweight":
                continue
            names = ("qweight", "qzeros", "scales", "g_idx")
            found = {part: plain.pop(f"{base}.{part}", None) for part in names}
            views[f"{base}.weight"] = view(folder, base, found)
        if len(plain) == len(tensors):
            raise UserError(
                f"{folder} has weights in {name} by its config.json, and none by its files."
            )
        return plain | views.stored()

    def view(folder: Path, base: str, found: dict[str, Stored | None]) -> RowView:
        q, z, s, g = (None if part is None else part.view() for part in found.values())
        if q is None or z is None or s is None:
            raise UserError(f"{folder} lacks the qzeros or scales of {base:.120}.")
        shapes = [tuple(part.get_shape()) for part in (q, z, s)]
        if any(len(shape) != 2 for shape in shapes):
            raise UserError(f"{folder} does not store {base:.120} as matrices.")
        (high, wide), zeros, (groups, columns) = shapes
        inputs = high * each if down else high
        length = inputs if size == -1 else size
        good = columns == (wide if down else wide * each) and groups == -(-inputs // length)
        good = good and zeros == (groups, -(-columns // each))
        good = good and q.get_dtype() == z.get_dtype() == "I32"
        good = good and (g is None or tuple(g.get_shape()) == (inputs,))
        if not good:
            raise UserError(f"{folder} stores {base:.120} in shapes that do not fit: {shapes}.")

        def group() -> np.ndarray:
            index = np.arange(inputs) // length if g is None else np.asarray(g[...])
            if index.min() < 0 or index.max() >= groups:
                raise UserError(
                    f"{folder} names groups of {base:.120} that it does not have (g_idx)."
                )
            return index

        def read(start: int, stop: int) -> np.ndarray:
            first, last = start // each, -(-stop // each)
            inside = slice(start - first * each, stop - first * each)
            zero = _parts(z[:, first:last], shifts, mask)[:, inside] + np.int32(added)
            if down:
                weight = _parts(np.ascontiguousarray(q[:, start:stop].T), shifts, mask).T
            else:
                weight = _parts(q[:, first:last], shifts, mask)[:, inside]
            index = group()
            scale = s[:, start:stop].astype(np.float32)
            return ((weight - zero[index]).astype(np.float32) * scale[index]).T

        return RowView((columns, inputs), "F32", read)

    return Packing(name, unpack)


def _parts(words: np.ndarray, shifts: np.ndarray, mask: int) -> np.ndarray:
    """`int32[rows, words]` -> `int32[rows, words * parts]`."""
    return ((words[..., None] >> shifts) & np.int32(mask)).reshape(len(words), -1)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


_METHODS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "fp8": _scaled,
    "fbgemm_fp8": _scaled,
    "modelopt": _scaled,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
