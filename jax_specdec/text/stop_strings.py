"""Stop strings as an automaton over tokens, so that a row ends on the device, inside a block.

An Aho-Corasick automaton over bytes is lifted to tokens: from every state, reading a token's bytes leads
to a state, or completes a stop string on the way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_specdec.errors import UserError

COMPLETE = -2


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for bytes (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in kept}
    rest = [byte for byte in range(256) if byte not in kept]
    table.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return table


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes each token adds to the text; special and unused ids add none.

    Reads byte-level BPE (GPT-2, Llama 3, Qwen) and sentencepiece-style vocabularies (Llama 2, Mistral:
    U+2581 for a space, `<0xNN>` for bytes).
    """
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    alphabet = _byte_alphabet()
    ordinary = [n for i, n in enumerate(names) if n is not None and i not in special]
    sentencepiece = any("\u2581" in name for name in ordinary)

    def spell(name: str) -> bytes:
        if sentencepiece:
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()
        if all(char in alphabet for char in name):
            return bytes(alphabet[char] for char in name)
        return name.encode()  # an added token is spelled as it is

    out = [
        b"" if name is None or index in special else spell(name) for index, name in enumerate(names)
    ]
    return out + [b""] * (vocab_size - len(out))


def stop_automaton(
    stops: Sequence[Sequence[str]], pieces: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """The token automaton of several rows' stop strings.

    Args:
      stops: the stop strings of each row. pieces: see `token_bytes`.

    Returns:
      `(table int32[A, V], start int32[rows])`: next state, `COMPLETE` once a stop string is in the text;
      the start state of each row, -1 where it has none. Rows with the same stop strings share states.
    """
    tables: list[np.ndarray] = []
    starts: dict[tuple[str, ...], int] = {}
    offset = 0
    start = np.full((len(stops),), -1, np.int32)
    for row, strings in enumerate(stops):
        key = tuple(strings)
        if not key:
            continue
        if any(not s for s in key):
            raise UserError("A stop string must not be empty.")
        if key not in starts:
            byte_table = _byte_automaton([s.encode() for s in key])
            table = _lift(byte_table, pieces)
            tables.append(np.where(table >= 0, table + offset, table))
            starts[key] = offset
            offset += len(table)
        start[row] = starts[key]
    if not tables:
        return np.zeros((0, len(pieces)), np.int32), start
    return np.concatenate(tables).astype(np.int32), start


def _byte_automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """Aho-Corasick over bytes, `int32[states, 256]`, `COMPLETE` where a pattern ends."""
    children: list[dict[int, int]] = [{}]
    final = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
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
    return np.where(ends[table], COMPLETE, table)


def _lift(byte_table: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """Reads whole tokens instead of bytes: `int32[states, V]`."""
    states = np.arange(len(byte_table), dtype=np.int32)
    table = np.broadcast_to(states[:, None], (len(states), len(pieces))).copy()
    longest = max(map(len, pieces), default=0)
    padded = np.zeros((len(pieces), max(longest, 1)), np.int64)
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
