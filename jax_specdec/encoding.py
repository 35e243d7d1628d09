"""Requests as the arrays that a decoder's programs take."""

import dataclasses
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.sampling import Sampling, make_sampling
from jax_specdec.core.sharding import put_rows
from jax_specdec.errors import UserError, shown_value
from jax_specdec.generation import SAMPLED, Request, each
from jax_specdec.options import no_tuple
from jax_specdec.text.chat import chat_ids, check_text
from jax_specdec.text.inputs import as_prompt, is_chat, is_whole
from jax_specdec.text.stop_strings import special_stops, stop_rows
from jax_specdec.text.token_bytes import TokenBytes

# Text buffers come in powers of two from here up to the context: so many programs at most.
SMALLEST_CAPACITY = 128


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A request with its prompt, stop tokens and bad words as token ids.

    Attributes:
      request: its prompt in the form that `text.inputs.as_prompt` gives.
    """

    request: Request
    ids: list[int]
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


class Encoder:
    """Puts requests to a target on token ids. Several threads may use one.

    Attributes:
      token_bytes: of the target's tokenizer, None where it has none.
    """

    def __init__(self, target: Target):
        self.target = target
        self.token_bytes = None if target.tokenizer is None else TokenBytes(target.tokenizer)
        self._lock = threading.Lock()  # tokenizers are changed by use

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt in any form (`text.inputs`), checked.

        Raises:
          UserError: an empty prompt, one longer than the context, or ids outside the vocabulary.
        """
        prompt, tokenizer = as_prompt(prompt), self.target.tokenizer
        if isinstance(prompt, str) or is_chat(prompt):
            if not prompt:
                raise UserError("The prompt is empty.")
            if tokenizer is None:
                raise UserError("A text prompt needs a tokenizer: load the target with one.")
            with self._lock:
                if isinstance(prompt, str):
                    ids = tokenizer(prompt, verbose=False)["input_ids"]
                else:
                    ids = chat_ids(tokenizer, prompt)
        else:
            ids = prompt
        if not ids:
            raise UserError("The prompt is empty.")
        context, vocab = self.target.config.context, self.target.vocab_size
        if len(ids) >= context:
            raise UserError(
                f"The prompt has {len(ids)} tokens, but the context of {context} must also hold at least "
                "one new token."
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise UserError(
                f"The prompt has token ids outside the vocabulary of {vocab}: they are of another model's tokenizer."
            )
        return ids

    def capacity(self, longest: int, max_new_tokens: int) -> int:
        """The text buffer for a prompt of `longest` tokens: a power of two, at most the context."""
        context = self.target.config.context
        wanted = min(longest + max_new_tokens, context)
        size = SMALLEST_CAPACITY
        while size < wanted:
            size *= 2
        return min(size, context)

    def requests(self, requests: Sequence[Request]) -> list[Encoded]:
        """The requests on token ids, all that they ask for checked.

        Raises:
          UserError: what is wrong, and with which prompt where there are several.
        """
        encoded = each(requests, self._request)
        try:
            make_sampling(len(requests), **_settings(requests))
        except UserError:  # whose it is
            each(requests, lambda request: make_sampling(1, **_settings([request])))
            raise
        return encoded

    def _request(self, request: Request) -> Encoded:
        """The request on token ids, those of its values checked that `make_sampling` does not see."""
        request = dataclasses.replace(request, prompt=as_prompt(request.prompt))
        ids, own = self.encode(request.prompt), self.token_bytes
        stop, words = request.stop, request.bad_words
        if not isinstance(stop, (tuple, list)) or not all(isinstance(x, str) for x in stop):
            raise no_tuple("stop", stop)
        if not isinstance(words, (tuple, list)):
            raise no_tuple("bad_words", words)
        for name in ("own_seed", "ignore_eos"):
            if not isinstance(getattr(request, name), (bool, np.bool)):
                value = shown_value(getattr(request, name))
                raise UserError(f"{name} must be True or False, got {value}.")
        if "" in stop:
            raise UserError("A stop string must not be empty.")
        if stop and own is None:
            raise UserError("Stop strings need a tokenizer: load the target with one.")
        if stop:
            special_stops(own, stop)
        vocab = self.target.vocab_size
        for what, tokens, example in (
            ("stop token", request.stop_token_ids, "stop_token_ids=(2,)"),
            ("logit bias", request.logit_bias, "logit_bias={2: -1.0}"),
        ):
            text = isinstance(tokens, (str, bytes))
            if text or not isinstance(tokens, Collection) or not all(map(is_whole, tokens)):
                raise UserError(
                    f"A {what} is given by its token id, a whole number, as in {example}, "
                    f"got {shown_value(tokens)}."
                )
            if outside := [token for token in tokens if not 0 <= token < vocab]:
                raise UserError(
                    f"A {what} has an id outside the vocabulary of {vocab}: {outside[0]}."
                )
        eos = () if request.ignore_eos else self.target.config.eos_ids
        forbidden = tuple(word for item in words for word in self._words(item))
        return Encoded(request, ids, (*eos, *request.stop_token_ids), forbidden)

    def _words(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """The token sequences of a bad word: as it begins a text, and as it follows a space."""
        vocab = self.target.vocab_size
        if not isinstance(word, str):
            tokens = list(word) if isinstance(word, (tuple, list)) else []
            if not tokens or any(not (is_whole(token) and 0 <= token < vocab) for token in tokens):
                hint = ": give its ids as a tuple, as in bad_words=((5, 6),)" * is_whole(word)
                raise UserError(
                    f"A bad word must be text, or tokens of the vocabulary of {vocab}, got {shown_value(word)}{hint}."
                )
            return [tuple(tokens)]
        if self.target.tokenizer is None:
            raise UserError("Bad words as text need a tokenizer: load the target with one.")
        if not word:
            raise UserError("A bad word must not be empty.")
        check_text(word, "A bad word")
        spelled = self.target.tokenizer([word, f" {word}"], add_special_tokens=False)["input_ids"]
        return list(dict.fromkeys(map(tuple, spelled)))

    def arrays(
        self, batch: Sequence[Encoded], least: int = 0
    ) -> tuple[tuple[Any, Any, Sampling, Any], int]:
        """What a batch's programs take, where it lies, and the text capacity, at least `least`."""
        longest = max(len(row.ids) for row in batch)
        capacity = self.capacity(longest, max(row.request.max_new_tokens for row in batch))
        capacity = max(capacity, least)
        tokens = np.zeros((len(batch), capacity), np.int32)
        for place, row in enumerate(batch):
            tokens[place, : len(row.ids)] = row.ids
        lengths = np.asarray([len(row.ids) for row in batch], np.int32)
        numbers = np.asarray([row.request.key for row in batch], np.int32)
        sharding = self.target.sharding
        sampling = put_rows(self._sampling(batch), sharding)
        tokens, lengths, numbers = put_rows((tokens, lengths, numbers), sharding)
        return (tokens, lengths, sampling, numbers), capacity

    def _sampling(self, batch: Sequence[Encoded]) -> Sampling:
        table, start = None, -1
        strings = [row.request.stop for row in batch]
        if any(strings):
            prompts = [row.ids for row in batch]
            table, start = stop_rows(self.token_bytes, self.target.vocab_size, strings, prompts)
            states = 1 << max(3, (len(table) - 1).bit_length())
            table = np.pad(table, ((0, states - len(table)), (0, 0)))
        most = max(4, 1 << (max(len(row.stop_ids) for row in batch) - 1).bit_length())
        stops = [(*row.stop_ids, *(-1,) * (most - len(row.stop_ids))) for row in batch]
        return make_sampling(
            len(batch),
            **_settings([row.request for row in batch]),
            own_seed=[row.request.own_seed for row in batch],
            bad_words=[list(row.bad_words) for row in batch],
            stop_ids=np.asarray(stops, np.int32),
            stop_state=start,
            stop_table=table,
        )


def _settings(requests: Sequence[Request]) -> dict[str, Any]:
    """What `make_sampling` takes of requests, a list for each setting."""
    return {name: [getattr(request, name) for request in requests] for name in SAMPLED}
