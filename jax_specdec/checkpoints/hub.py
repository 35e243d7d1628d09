"""Checkpoints by path or by their id on the Hugging Face hub."""

import os
import re
from pathlib import Path

from jax_specdec.checkpoints import smollm2
from jax_specdec.checkpoints.gguf_file import SUFFIX as GGUF
from jax_specdec.checkpoints.gguf_file import is_gguf
from jax_specdec.checkpoints.tensor_files import absent_shards
from jax_specdec.checkpoints.tokenizer_files import TOKENIZER_FILES
from jax_specdec.errors import UserError, a_kind, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_GGUF = re.compile(rf"({HUB_ID.pattern})/([\w./-]+\{GGUF})")
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
    """The local folder or GGUF file of a path or hub id, downloaded where needed.

    `OWNER/NAME/FILE.gguf` is one file of the hub.

    Raises:
      UserError: neither a folder or GGUF file here nor a model that can be fetched.
    """
    folder = local_path(source)
    if folder.is_dir():
        return _gguf_or_folder(folder)
    if folder.is_file():
        if is_gguf(folder):
            return folder
        raise UserError(
            f"{source} is a file and no GGUF; name the folder that holds config.json and the weights."
        )
    if str(source) == smollm2.NAME:
        return smollm2.find()
    one = HUB_GGUF.fullmatch(str(source))
    if one is None and not HUB_ID.fullmatch(str(source)):
        what = "file" if folder.suffix == GGUF else "folder"
        raise UserError(f"There is no {what} {source!s:.300}.")
    import huggingface_hub

    try:
        if one is not None:
            return Path(huggingface_hub.hf_hub_download(one[1], one[2]))
        path = huggingface_hub.snapshot_download(str(source), allow_patterns=list(HUB_PATTERNS))
        shards = absent_shards(Path(path))
        if shards:  # called otherwise than transformers calls them
            path = huggingface_hub.snapshot_download(str(source), allow_patterns=shards)
        if not _has_weights(Path(path)):
            files = [
                name for name in huggingface_hub.list_repo_files(str(source)) if name.endswith(GGUF)
            ]
            if files:
                return Path(huggingface_hub.hf_hub_download(str(source), _only(source, files)))
    except UserError:
        raise
    except Exception as error:  # HTTP clients, proxies and caches fail in too many ways to list
        raise _unfetched(source, error) from error
    return Path(path)


def _gguf_or_folder(folder: Path) -> Path:
    """A folder, or the one GGUF file in it where it has no other weights."""
    if _has_weights(folder):
        return folder
    files = sorted(path.name for path in folder.glob(f"*{GGUF}"))
    return folder / _only(folder, files) if files else folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors*"))


def _only(source: str | os.PathLike[str], files: list[str]) -> str:
    if len(files) > 1:
        more = f", and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(
            f"{source} holds several GGUF files; name one, as {source}/{files[0]} (others: "
            f"{', '.join(files[1:3])}{more})."
        )
    return files[0]


def fetch_config(source: str | os.PathLike[str]) -> Path:
    """The config.json of a path or hub id: a folder's, a file of any name, or the hub's, without weights.

    A GGUF file, also a folder's only one, stands for its own.

    Raises:
      UserError: there is none.
    """
    path = local_path(source)
    if str(source) == smollm2.NAME and not path.exists():
        path = smollm2.find()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        found = _gguf_or_folder(path)
        if found == path:
            raise UserError(f"{path} has no config.json.")
        return found
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"There is no folder or file {source!s:.300}.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(source), "config.json"))
    except Exception as error:
        raise _unfetched(source, error) from error


def local_path(source: str | os.PathLike[str]) -> Path:
    """Where a name would lie here.

    Raises:
      UserError: no name, an empty one, or one that no file system takes.
    """
    if not isinstance(source, (str, os.PathLike)):
        hint = ": SpeculativeDecoder takes one that is loaded" if hasattr(source, "params") else ""
        raise UserError(f"A model is a folder or a hub id, not {a_kind(source)}{hint}.")
    if not os.fspath(source):
        raise UserError("The model's name is empty: give a folder, or a model id of the hub.")
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(source)} names no folder: {reason!s:.100}.") from None
    return path


def _unfetched(source: str | os.PathLike[str], error: Exception) -> UserError:
    """Why a model of the hub is not here, and what to do."""
    from huggingface_hub import errors

    absent = f"{source} is no folder here and "
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return UserError(
            f"{absent}the Hugging Face hub cannot be reached: look at the connection (and at HF_HUB_OFFLINE), or run "
            f"`hf download {source}` where there is one and name the folder that it prints."
        )
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{absent}the hub gives it only to those it knows: ask on its page, then `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{absent}the Hugging Face hub has no such model, or a private one (`hf auth login`)."
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"{absent}could not be fetched from the Hugging Face hub: {reason:.300}")
