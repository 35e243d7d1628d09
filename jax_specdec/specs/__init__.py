"""The language of `--drafter`, and drafters built from it."""
