"""Where the demo's checkpoint lies: in a checkout, or in the package `jax_specdec_demo`."""

import importlib.util
from pathlib import Path

from jax_specdec.errors import UserError

CHECKOUT = Path(__file__).parents[2] / "checkpoints/demo"
PACKAGE = "jax_specdec_demo"


def demo_folder() -> Path:
    """The folder with `target`, `lm`, `glide`, `medusa` and `bigram`.

    Raises:
      UserError: it is neither here nor installed.
    """
    folders = [CHECKOUT]
    found = importlib.util.find_spec(PACKAGE)
    if found is not None:
        folders += [Path(home) / "demo" for home in found.submodule_search_locations or ()]
    for folder in folders:
        if (folder / "target/config.json").is_file():
            return folder
    raise UserError(
        'There is no embedded checkpoint here: `pip install "jax-specdec[demo]"` brings it, or name another model.'
    )
