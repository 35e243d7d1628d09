"""Compiling for TPUs on a machine that has none: libtpu knows the generations by name."""

import os

# Test workers are several processes, and libtpu otherwise allows one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
