"""Prompts from the command line, a JSONL file or standard input."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_specdec.errors import UserError
from jax_specdec.text.chat import check_messages, check_text, is_message
from jax_specdec.text.jsonl import read_jsonl

# Sampling parameters that a record may carry, and what they must be.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_new_tokens": ((int,), "a whole number"),
    "temperature": ((int, float), "a number"),
    "top_k": ((int,), "a whole number"),
    "top_p": ((int, float), "a number"),
    "min_p": ((int, float), "a number"),
    "seed": ((int,), "a whole number"),
    "min_new_tokens": ((int,), "a whole number"),
    "repetition_penalty": ((int, float), "a number"),
    "presence_penalty": ((int, float), "a number"),
    "frequency_penalty": ((int, float), "a number"),
}
# Those that are lists or objects.
_WHOLE = ("stop", "stop_token_ids", "bad_words", "logit_bias")

# What others call them, by their bare form.
_ALIASES = {
    "temp": "temperature",
    "maxlength": "max_new_tokens",
    "maxcompletiontoken": "max_new_tokens",
    "stopsequence": "stop",
    "stopstring": "stop",
    "randomseed": "seed",
    "stopid": "stop_token_ids",
    "eostokenid": "stop_token_ids",
    "badword": "bad_words",
}


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
      messages: a chat in place of a text; `prompt` is then what was said last.
      settings: sampling parameters of its own, `stop` among them as a tuple.
      where: its place in a file, for messages; empty elsewhere.
    """

    id: Any
    prompt: str
    category: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""
    messages: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self):
        start = f"{self.where}: the" if self.where else "The"
        if not self.prompt and not self.messages:
            raise UserError(f"{start} prompt is empty.")
        check_text(self.prompt, f"{start} prompt")  # bytes of a terminal may be none


def read_prompts(path: str | Path, *, chats: bool = False) -> list[PromptRecord]:
    """The prompts of a JSONL file.

    A record is `{"id", "prompt"}`, or one of Spec-Bench, `{"question_id", "category", "turns"}`, whose
    first turn counts, or, where `chats` are known, `{"id", "messages"}`, a chat to be answered. It may carry settings of its own, named as the fields of `generation.Request`, and
    anything else that is not one of these misspelt. Without an id it gets its number, from 0.

    Raises:
      UserError: no such file, no records, or a record that is wrong, with its line.
    """
    records = [
        _record(f"{path}, line {line}", number, record, chats)
        for number, (line, record) in enumerate(read_jsonl(path))
    ]
    if not records:
        raise UserError(f"{path} holds no prompts.")
    return records


def prompt_of_input(text: str) -> PromptRecord:
    """Standard input as one prompt.

    A byte order mark, and the newline that ends a file or that `echo` adds, are not part of it.
    """
    return PromptRecord(0, text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r"))


def _record(where: str, number: int, record: dict[str, Any], chats: bool) -> PromptRecord:
    prompt = record.get("prompt")
    if prompt is None and "turns" in record:
        turns = record["turns"]
        prompt = turns[0] if isinstance(turns, list) and turns else None
        if not isinstance(prompt, str):
            raise UserError(f'{where}: expected a list of strings in "turns".')
    messages: list[dict[str, Any]] = []
    if prompt is None and chats and "messages" in record:
        messages = _messages(where, record["messages"])
        said = messages[-1]["content"]
        prompt = said if isinstance(said, str) else ""
    if not isinstance(prompt, str):
        also = 'a chat in "messages", or ' if chats else ""
        raise UserError(f'{where}: expected a string in "prompt" (or {also}Spec-Bench\'s "turns").')
    name = record.get("id", record.get("question_id"))
    return PromptRecord(
        id=number if name is None else name,
        prompt=prompt,
        category=record.get("category"),
        settings=_settings(where, record),
        where=where,
        messages=messages,
    )


def _messages(where: str, given: Any) -> list[dict[str, Any]]:
    """A chat that waits for an answer."""
    if not isinstance(given, list) or not given or not all(map(is_message, given)):
        raise UserError(f'{where}: "messages" must be a list of objects with "role" and "content".')
    try:
        messages = check_messages(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the last message is the assistant's: there is nothing to answer."
        )
    return messages


def _settings(where: str, record: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key in record:
        meant = _misspelt(key)
        if meant:
            raise UserError(f'{where}: unknown setting "{key:.80}"; did you mean "{meant}"?')
    for name, (kinds, expected) in _KINDS.items():
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f'{where}: "{name}" must be {expected}, got {value!r:.80}.')
        settings[name] = value
    for name in ("stop", "bad_words"):
        given = record.get(name)
        if given is not None:
            strings = [given] if isinstance(given, str) else given
            if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
                raise UserError(
                    f'{where}: "{name}" must be a string or a list of non-empty strings.'
                )
            settings[name] = tuple(strings)
    stops = record.get("stop_token_ids")
    if stops is not None:
        if not isinstance(stops, list) or not all(type(token) is int for token in stops):
            raise UserError(f'{where}: "stop_token_ids" must be a list of token ids.')
        settings["stop_token_ids"] = tuple(stops)
    if record.get("logit_bias") is not None:
        settings["logit_bias"] = _bias(where, record["logit_bias"])
    return settings


def _bias(where: str, given: Any) -> dict[int, float]:
    """`{"TOKEN ID": number}`, as JSON has it."""
    try:
        numbers = {int(token): value for token, value in given.items()}
        good = all(type(value) in (int, float) for value in numbers.values())
    except (AttributeError, ValueError):
        numbers, good = {}, False
    if not good:
        raise UserError(
            f'{where}: "logit_bias" must be an object of numbers by token id, as in {{"42": -5}}.'
        )
    return numbers


def _misspelt(key: str) -> str | None:
    """The setting that a key nearly is: short names but for their spelling, long ones by likeness."""
    names = {_bare(name): name for name in (*_KINDS, *_WHOLE)}
    if key in names.values():
        return None
    bare = _bare(key)
    if bare in names or bare in _ALIASES:
        return names.get(bare) or _ALIASES[bare]
    long = [name for name in names if len(name) > 6]
    close = difflib.get_close_matches(bare, long, n=1, cutoff=0.8)
    return names[close[0]] if close else None


def _bare(name: str) -> str:
    return name.casefold().translate(str.maketrans("", "", "_- ")).removesuffix("s")
