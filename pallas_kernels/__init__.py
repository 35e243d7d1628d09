"""Kernels for verifying trees of drafted tokens against a KV cache: attention, and the commit."""

from pallas_kernels import masks, tuning
from pallas_kernels._rows import precision_of
from pallas_kernels.commit import COMMIT_BACKENDS, commit, write_rows
from pallas_kernels.partition import Partition
from pallas_kernels.tree_attention import BACKENDS, tree_attention

__all__ = [
    "BACKENDS",
    "COMMIT_BACKENDS",
    "Partition",
    "commit",
    "masks",
    "precision_of",
    "tree_attention",
    "tuning",
    "write_rows",
]
