"""Shapes and types of signatures, checked at every call while tests run."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("jax_specdec.core", "jax_specdec.drafters", "jax_specdec.expansions", "pallas_kernels")
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function):
    """All but constructors: JAX rebuilds pytrees with whatever their leaves have become."""
    return function if function.__name__ == "__init__" else _beartype(function)


def install() -> None:
    """To be called before any of the packages is imported."""
    install_import_hook(PACKAGES, "checked.checked")
