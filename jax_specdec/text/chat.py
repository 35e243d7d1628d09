"""Prompts in a model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_specdec.errors import UserError, a_kind, shown, shown_value

# `{"role": ..., "content": ...}`, and what else a template reads of a message.
Message = Mapping[str, Any]

_PROBE = "jaxspecdecprobe"
# Names that a template has of transformers, whatever it is given.
_BY_TRANSFORMERS = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")


def is_message(value: Any) -> bool:
    """Whether this is one message of a chat.

    >>> is_message({"role": "user", "content": "Hello"}), is_message("Hello")
    (True, False)
    """
    return isinstance(value, Mapping) and "role" in value


def check_text(text: str, what: str) -> None:
    """Raises a `UserError` for a text that has no bytes: one with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid Unicode text: character {error.start + 1} is half of a surrogate pair."
        ) from None


def chat_text(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    answer_follows: bool = True,
    instead: str = "",
) -> str:
    """A chat as text, and what the template puts before the answer.

    A template takes a message's content as text or as a list of parts; one that wants parts may leave a
    text out without a word, so which it is is asked of a probe.

    Args:
      prompt: the messages, or the text of the user's only one.
      template: Jinja, in place of the tokenizer's own.
      template_args: what else the template is given, such as `enable_thinking`.
      answer_follows: False leaves out what stands before an answer.
      instead: what can be done without a template, for messages; default: to give the prompt as text.

    Raises:
      UserError: no template, one that fails or leaves something out, an argument that it does not know, or
        messages that are none.
    """
    alone = isinstance(prompt, str)
    instead = instead or ("leave out --chat" if alone else "give the prompt as text")
    messages = [{"role": "user", "content": prompt}] if alone else check_messages(prompt)
    if not (template or tokenizer.chat_template):
        raise UserError(
            f"The tokenizer has no chat template: {instead}, or give a template (--template FILE)."
        )
    if not (template is None or isinstance(template, str)):
        raise UserError(f"A template is Jinja as text, not {a_kind(template)}.")
    if not (template_args is None or isinstance(template_args, Mapping)):
        raise UserError(
            'template_args are a dictionary, as in {"enable_thinking": False}, '
            f"not {a_kind(template_args)}."
        )
    options: dict[str, Any] = dict(template_args or {})
    _check_args(tokenizer, template, options)
    if template:
        options["chat_template"] = template

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer_follows, tokenize=False, **options
        )

    failure: Exception | None = None
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        try:
            if _PROBE in render([{"role": "user", "content": content(_PROBE)}]):
                text = render([_with_content(message, content) for message in messages])
                break
        except Exception as error:  # a template's code is the checkpoint's
            failure = failure or error
    else:
        if failure is None:
            raise UserError(
                f"The chat template leaves out what the user says: {instead}, or give another template."
            )
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise UserError(f"The chat template fails: {reason:.300}") from failure
    check_text(text, "The chat")
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    if isinstance(system, str) and system.strip() not in text:
        raise UserError("The chat template leaves out the system message: leave it out, too.")
    return text


def chat_ids(tokenizer: Any, prompt: str | Sequence[Message], **options: Any) -> list[int]:
    """Token ids of `chat_text`, whose template brings the special tokens along."""
    text = chat_text(tokenizer, prompt, **options)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dictionaries, the parts of a content, `[{"type": "text", "text": ...}]`, joined.

    Raises:
      UserError: no list, what is no message, has no role or no content, or a part that is no text.
    """
    joined = []
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"A chat is a list of messages, not {a_kind(messages)}.")
    for number, message in enumerate(messages, 1):
        if not is_message(message):
            raise UserError(
                f'Message {number} of the chat must have "role" and "content", got {shown_value(message)}.'
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise UserError(
                f'Message {number} of the chat: "role" must be a text, got {shown_value(role)}.'
            )
        if not isinstance(content, (str, list, tuple)) and not message.get("tool_calls"):
            raise UserError(
                f'Message {number} of the chat: "content" must be a text, got {shown_value(content)}.'
            )
        if isinstance(content, (list, tuple)):
            content = "".join(_part(part, number) for part in content)
        if isinstance(content, str):
            check_text(content, f"Message {number} of the chat")
        joined.append({**message, "content": content} if "content" in message else dict(message))
    return joined


def _part(part: Any, number: int) -> str:
    """The text of a content's part."""
    if (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ):
        return part["text"]
    raise UserError(
        f'Message {number} of the chat: each part of its content must be {{"type": "text", "text": ...}}, got '
        f"{shown_value(part)}."
    )


def _with_content(message: dict[str, Any], content: Any) -> dict[str, Any]:
    said = message.get("content")
    return {**message, "content": content(said)} if isinstance(said, str) else message


def _check_args(tokenizer: Any, template: str | None, given: Mapping[str, Any]) -> None:
    """Jinja ignores what a template does not use, so a misspelt argument would change nothing."""
    if not given:
        return
    import jinja2.meta

    source: Any = template or tokenizer.chat_template
    try:
        env = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        used = jinja2.meta.find_undeclared_variables(env.parse(source))
    except Exception:  # with blocks of its own, or several templates: what it uses is not known
        return
    own = {*env.globals, *tokenizer.special_tokens_map, *_BY_TRANSFORMERS}
    if unknown := [name for name in given if name not in used - own]:
        known = ", ".join(sorted(used - own)) or "none"
        raise UserError(
            f"The chat template has no argument {shown(unknown[0])}; its arguments: {known:.300}."
        )
