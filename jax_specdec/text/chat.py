"""A prompt in a model's chat template."""

from typing import Any

from jax_specdec.errors import UserError

_PROBE = "jaxspecdecprobe"


def chat_text(tokenizer: Any, prompt: str) -> str:
    """A prompt as the user's only message, and what the template puts before the answer.

    A template takes a message's content as text or as a list of parts; one that wants parts may leave a
    text out without a word, so which it is is asked of a probe.

    Raises:
      UserError: no template, or one that fails or leaves the prompt out.
    """
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: leave out --chat.")
    failure: Exception | None = None
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        try:
            if _PROBE in _render(tokenizer, content(_PROBE)):
                return _render(tokenizer, content(prompt))
        except Exception as error:  # a template's code is the checkpoint's
            failure = failure or error
    if failure is None:
        raise UserError("The chat template leaves out what the user says: leave out --chat.")
    reason = " ".join(str(failure).split()) or type(failure).__name__
    raise UserError(f"The chat template fails: {reason:.300}") from failure


def _render(tokenizer: Any, content: Any) -> str:
    message = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
