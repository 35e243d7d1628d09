"""Prompts in a model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_specdec.errors import UserError, shown_value

# `{"role": ..., "content": ...}`, and what else a template reads of a message.
Message = Mapping[str, Any]

_PROBE = "jaxspecdecprobe"


def is_message(value: Any) -> bool:
    """Whether this is one message of a chat.

    >>> is_message({"role": "user", "content": "Hello"}), is_message("Hello")
    (True, False)
    """
    return isinstance(value, Mapping) and "role" in value


def chat_text(tokenizer: Any, prompt: str | Sequence[Message]) -> str:
    """A chat as text, and what the template puts before the answer.

    A template takes a message's content as text or as a list of parts; one that wants parts may leave a
    text out without a word, so which it is is asked of a probe.

    Args:
      prompt: the messages, or the text of the user's only one.

    Raises:
      UserError: no template, one that fails or leaves the prompt out, or messages that are none.
    """
    alone = isinstance(prompt, str)
    instead = "leave out --chat" if alone else "give the prompt as text"
    messages = [{"role": "user", "content": prompt}] if alone else check_messages(prompt)
    if not tokenizer.chat_template:
        raise UserError(f"The tokenizer has no chat template: {instead}.")
    failure: Exception | None = None
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        try:
            if _PROBE in _render(tokenizer, [{"role": "user", "content": content(_PROBE)}]):
                return _render(tokenizer, [_with_content(message, content) for message in messages])
        except Exception as error:  # a template's code is the checkpoint's
            failure = failure or error
    if failure is None:
        raise UserError(f"The chat template leaves out what the user says: {instead}.")
    reason = " ".join(str(failure).split()) or type(failure).__name__
    raise UserError(f"The chat template fails: {reason:.300}") from failure


def chat_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of `chat_text`, whose template brings the special tokens along."""
    text = chat_text(tokenizer, prompt)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dictionaries.

    Raises:
      UserError: one that has no role or no content.
    """
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise UserError(
                f'Message {number} of the chat: "role" must be a text, got {shown_value(role)}.'
            )
        if not isinstance(content, (str, list, tuple)) and not message.get("tool_calls"):
            raise UserError(
                f'Message {number} of the chat: "content" must be a text, got {shown_value(content)}.'
            )
    return [dict(message) for message in messages]


def _with_content(message: dict[str, Any], content: Any) -> dict[str, Any]:
    said = message.get("content")
    return {**message, "content": content(said)} if isinstance(said, str) else message


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
