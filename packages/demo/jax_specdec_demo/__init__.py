"""The checkpoint of jax-specdec's demo: `FOLDER` has the folders target, lm, glide, medusa and bigram."""

from pathlib import Path

FOLDER = Path(__file__).parent / "demo"
