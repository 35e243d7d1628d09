"""Prints the libtpu that the installed jax is made for."""

from importlib.metadata import requires

print(next(line.split(";")[0].strip() for line in requires("jax") if line.startswith("libtpu")))
