"""`python -m jax_specdec`: the command line."""

import sys

from jax_specdec.cli import main

if __name__ == "__main__":
    sys.exit(main())
