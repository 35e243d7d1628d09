"""Axis letters, used in every signature:

`B` batch, `T` tree nodes including the root, `S` cache slots, `L` layers, `N` query heads, `K` key/value
heads, `G = N/K`, `D` head dim, `E` embed, `F` mlp, `V` vocabulary, `P` tokens on the longest path
(root excluded), `W = ceil(T/32)` bitmask words, `C` text capacity, `O` sources.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, UInt

Params = dict[str, Any]  # a tree of arrays by name

__all__ = ["Array", "Bool", "Float", "Int", "Params", "UInt"]
