"""Stop strings as an automaton over tokens, so that a row ends on the device, inside a block.

An Aho-Corasick automaton over bytes is lifted to tokens: from every state, reading a token's bytes leads
to a state, or completes a stop string on the way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_specdec.core.sampling import STRING_COMPLETE
from jax_specdec.errors import UserError
from jax_specdec.text.token_bytes import Lead, Place, TokenBytes, as_token_bytes


def special_stops(tokenizer: Any, stops: Sequence[str]) -> tuple[int, ...]:
    """The ids of those stop strings that are special tokens, which a text does not show.

    A row ends at that token, and where other tokens spell its name.

    Args:
      tokenizer: of transformers, or its `TokenBytes`.

    Raises:
      UserError: a stop string that no text can hold: an empty one, a special token with more around it,
        or one with U+FFFD, which stands for bytes that are no text, or half of a surrogate pair.
    """
    special = as_token_bytes(tokenizer).special
    ids = []
    for stop in stops:
        if not stop:
            raise UserError("A stop string must not be empty.")
        shown = repr(stop if len(stop) <= 40 else f"{stop[:40]}...")
        if "\ufffd" in stop or any("\ud800" <= char <= "\udfff" for char in stop):
            raise UserError(f"The stop string {shown} is not valid Unicode text.")
        if stop in special:
            ids.append(special[stop])
        elif inside := next((name for name in special if name and name in stop), None):
            raise UserError(
                f"The stop string {shown} holds the special token {inside[:40]!r}, which is not part of the "
                "text: stop at that token alone."
            )
    return tuple(ids)


def stop_rows(
    tokenizer: Any,
    vocab_size: int,
    stops: Sequence[Sequence[str]],
    prompts: Sequence[Sequence[int]],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The token automaton of answers: it completes where `answer_text` comes to hold a stop string.

    Args:
      tokenizer: of transformers, or its `TokenBytes`, which spells the vocabulary once for many calls.
      stops: the stop strings of each row. prompts: token ids of each row's prompt.
      token_ids: of each row, ids that end it as well.

    Returns:
      As `stop_automaton`.

    Raises:
      UserError: see `special_stops`; an id outside the vocabulary.
    """
    known = as_token_bytes(tokenizer)
    places = [known.after(prompt) for prompt in prompts]
    keys: list[tuple | None] = []
    for i, (strings, place) in enumerate(zip(stops, places, strict=True)):
        ends = (*special_stops(known, strings), *(token_ids[i] if token_ids is not None else ()))
        if outside := [index for index in ends if not 0 <= index < vocab_size]:
            raise UserError(
                f"The stop token {outside[0]} is outside the model's vocabulary of {vocab_size}."
            )
        keys.append((tuple(strings), ends, place.lead) if strings or ends else None)

    def build(key: tuple) -> np.ndarray:
        strings, ends, lead = key
        table = _token_automaton(strings, known.pieces(vocab_size))
        table = np.concatenate([table, *_lead_rows(known, strings, vocab_size, lead, len(table))])
        table[:, list(ends)] = STRING_COMPLETE
        return table

    table, start = _stack(keys, build)
    for row, place in enumerate(places):
        if start[row] < 0 or place == Place():
            continue
        automaton = _byte_automaton(stops[row])
        # No text stands before the answer, or bytes that the answer makes a character of.
        start[row] += len(automaton) if place.lead != Lead() else _read(automaton, place.head)
    return table, start


def _lead_rows(
    known: TokenBytes, strings: Sequence[str], vocab_size: int, lead: Lead, base: int
) -> list[np.ndarray]:
    """The states `base, ...` of a text that has not begun, the one of `lead` first."""
    automaton = _byte_automaton(strings)
    waiting = [] if lead == Lead() else [lead]
    rows = []
    for current in waiting:  # which grows
        steps = [known.step(index, current) for index in range(vocab_size)]
        row = _lift(automaton, [piece for piece, _ in steps])[0]
        for index, (_, after) in enumerate(steps):
            if after != Lead():
                if after not in waiting:
                    waiting.append(after)
                row[index] = base + waiting.index(after)
        rows.append(row[None])
    return rows


def stop_automaton(
    stops: Sequence[Sequence[str]], pieces: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """The token automaton of several rows' stop strings.

    Args:
      stops: the stop strings of each row. pieces: see `token_bytes`.

    Returns:
      `(table int32[A, V], start int32[rows])`: next state, `STRING_COMPLETE` once a stop string is in the text;
      the start state of each row, -1 where it has none. Rows with the same stop strings share states.
    """
    if any(not s for strings in stops for s in strings):
        raise UserError("A stop string must not be empty.")
    table, start = _stack(
        [tuple(strings) or None for strings in stops], lambda key: _token_automaton(key, pieces)
    )
    return (table if len(table) else np.zeros((0, len(pieces)), np.int32)), start


def _stack(
    keys: Sequence[tuple | None], build: Callable[[tuple], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """One table of the automata of all keys, and where each begins; -1 for no key."""
    tables = [np.zeros((0, 0), np.int32)]
    starts: dict[tuple | None, int] = {None: -1}
    offset = 0
    for key in keys:
        if key is not None and key not in starts:
            table = build(key)
            tables.append(np.where(table >= 0, table + offset, table))
            starts[key] = offset
            offset += len(table)
    start = np.asarray([starts[key] for key in keys], np.int32)
    return np.concatenate(tables[1:] or tables).astype(np.int32), start


def _token_automaton(strings: Sequence[str], pieces: Sequence[bytes]) -> np.ndarray:
    return _lift(_byte_automaton(strings), pieces)


def _read(automaton: np.ndarray, data: bytes) -> int:
    """The state that some bytes lead to from the start."""
    state = 0
    for byte in data:
        state = int(automaton[state, byte])
    return state


def _byte_automaton(strings: Sequence[str]) -> np.ndarray:
    """Aho-Corasick over UTF-8, `int32[states, 256]`, `STRING_COMPLETE` where a pattern ends."""
    children: list[dict[int, int]] = [{}]
    final = [False]
    for string in strings:
        state = 0
        for byte in string.encode():
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                final.append(False)
            state = children[state][byte]
        final[state] = True
    table = np.zeros((len(children), 256), np.int32)
    fail = [0] * len(children)
    queue = [0]
    for state in queue:
        if state:
            table[state] = table[fail[state]]
        for byte, child in children[state].items():
            fail[child] = int(table[fail[state], byte]) if state else 0
            final[child] = final[child] or final[fail[child]]
            queue.append(child)
        for byte, child in children[state].items():
            table[state, byte] = child
    ends = np.asarray(final)
    return np.where(ends[table], STRING_COMPLETE, table)


def _lift(byte_table: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """Reads whole tokens instead of bytes: `int32[states, V]`."""
    states = np.arange(len(byte_table), dtype=np.int32)
    table = np.broadcast_to(states[:, None], (len(states), len(pieces))).copy()
    longest = max(map(len, pieces), default=0)
    padded = np.zeros((len(pieces), max(longest, 1)), np.uint8)
    lengths = np.asarray([len(piece) for piece in pieces])
    for index, piece in enumerate(pieces):
        padded[index, : len(piece)] = np.frombuffer(piece, np.uint8)
    for place in range(longest):
        column = np.flatnonzero(lengths > place)
        current = table[:, column]
        step = byte_table[np.maximum(current, 0), padded[column, place][None]]
        table[:, column] = np.where(current >= 0, step, current)
    return table


def truncate(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    cut = min((i for s in stops if (i := text.find(s)) >= 0), default=len(text))
    return text[:cut]
