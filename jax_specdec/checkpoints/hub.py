"""Checkpoints by path or by their id on the Hugging Face hub."""

import os
import re
from pathlib import Path

from jax_specdec.checkpoints.tensor_files import absent_shards
from jax_specdec.checkpoints.tokenizer_files import TOKENIZER_FILES
from jax_specdec.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names, not endings: hub patterns match across folders, and many models lie there in several forms.
HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "medusa_lm_head.safetensors*",
    *TOKENIZER_FILES,
)


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The local folder of a path or hub id, downloaded where needed.

    Raises:
      UserError: neither a folder here nor a model that can be fetched.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{source} is a file; name the folder that holds it and config.json.")
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"There is no folder {source}.")
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(str(source), allow_patterns=list(HUB_PATTERNS))
        shards = absent_shards(Path(path))
        if shards:  # called otherwise than transformers calls them
            path = huggingface_hub.snapshot_download(str(source), allow_patterns=shards)
    except UserError:
        raise
    except Exception as error:  # HTTP clients, proxies and caches fail in too many ways to list
        raise _unfetched(source, error) from error
    return Path(path)


def fetch_config(source: str | os.PathLike[str]) -> Path:
    """The config.json of a path or hub id: a folder's, a file of any name, or the hub's, without weights.

    Raises:
      UserError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json.")
        return path / "config.json"
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"There is no folder or file {source}.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(source), "config.json"))
    except Exception as error:
        raise _unfetched(source, error) from error


def _unfetched(source: str | os.PathLike[str], error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(
        f"{source} is no folder here and could not be fetched from the Hugging Face hub: {reason:.300}"
    )
