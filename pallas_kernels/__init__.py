"""Attention kernels for verifying trees of drafted tokens against a KV cache."""

from pallas_kernels import masks
from pallas_kernels.tree_attention import BACKENDS, tree_attention

__all__ = ["BACKENDS", "masks", "tree_attention"]
