"""The demo: the same prompts decoded plainly and speculatively, with a comparison of text and speed."""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from jax_specdec.checkpoints.targets import Target
from jax_specdec.generation import Chunk, Generation, near_tie
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.streaming import Piece, Pieces
from jax_specdec.text.chat import chat_text
from jax_specdec.text.detokenize import TextStream

COLOURS = ("green", "cyan", "magenta", "yellow", "blue")
ROUNDS_PER_CHUNK = 2


@dataclasses.dataclass(frozen=True)
class DemoPrompt:
    """A built-in prompt; `chat` says that a template has put its special tokens."""

    id: str
    prompt: str
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False


STORY = (
    "Once upon a time, there was a little fox who lived near a quiet pond. Every morning, the fox"
)
PROMPTS = (
    DemoPrompt("story", STORY),
    DemoPrompt(
        "story 2",
        "Once upon a time, a boy named Sam found a shiny key under his bed. He showed it to his mom and",
    ),
    DemoPrompt(
        "maths",
        "Question: A baker makes 24 rolls in the morning and 18 rolls in the afternoon. She sells each "
        "roll for $2. How much money does she earn if she sells all of them?\nAnswer:",
    ),
    DemoPrompt(
        "maths 2",
        "Question: Mia reads 15 pages of her book on Monday and twice as many on Tuesday. The book has "
        "120 pages. How many pages are left?\nAnswer:",
    ),
    DemoPrompt("code", "Task: Write a function to find the largest number in a list.\nCode:\n"),
    DemoPrompt("story, sampled", STORY, temperature=0.8, seed=7),
)


PASSAGE = (
    "Maple syrup is made from the sap of sugar maples. In early spring, when the nights still freeze and the days "
    "are mild, farmers drill small holes into the trees and collect the sap in buckets. The sap is boiled until "
    "most of the water is gone. Forty litres of sap give one litre of syrup."
)
QUESTIONS = (
    DemoPrompt("summary", f"Summarize this text in two sentences.\n\n{PASSAGE}"),
    DemoPrompt("question", f"{PASSAGE}\n\nHow much sap does one litre of syrup take?"),
    DemoPrompt(
        "code",
        "Rename the variable x to total in this function.\n\ndef add(values):\n    x = 0\n    for value in values:\n"
        "        x = x + value\n    return x",
    ),
    DemoPrompt("advice", "Give me three tips for staying healthy."),
    DemoPrompt(
        "story, sampled", "Write a short story about a lighthouse.", temperature=0.8, seed=7
    ),
)


def chat_prompts(tokenizer: Any) -> tuple[DemoPrompt, ...]:
    """Built-in questions in a model's chat template."""
    return tuple(
        dataclasses.replace(question, prompt=chat_text(tokenizer, question.prompt), chat=True)
        for question in QUESTIONS
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What plain and speculative decoding of one prompt have in common.

    Attributes:
      first_difference: index of the first token that differs, None where all are equal.
      margin: by how much plain decoding's token beat the second best there.
      tie: below it a margin is a near tie.
    """

    first_difference: int | None
    margin: float | None
    tie: float

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    @property
    def acceptable(self) -> bool:
        """Identical, or different from a near tie on, where the arithmetic of either is right."""
        return self.margin is None or self.margin < self.tie

    def word(self) -> str:
        if self.identical:
            return "identical"
        return "near tie" if self.acceptable else "DIFFERENT"

    def sentence(self) -> str:
        if self.first_difference is None:
            return "The two outputs are identical."
        place = f"The two outputs differ from token {self.first_difference + 1} on"
        if self.acceptable:
            return f"{place}, a near tie: the two best scores are {self.margin:.1e} apart."
        return (
            f"{place}, where the two best scores are {self.margin:.3g} apart: this is NO near tie."
        )


def compare(plain: Generation, speculative: Generation, dtype: Any = "float32") -> Comparison:
    """Finds the first difference between two answers to the same prompt.

    Args:
      plain: with margins. dtype: of the target, which says how far rounding goes.
    """
    tie = near_tie(dtype)
    ours, theirs = plain.token_ids, speculative.token_ids
    if ours == theirs:
        return Comparison(None, None, tie)
    common = min(len(ours), len(theirs))
    first = next((i for i in range(common) if ours[i] != theirs[i]), common)
    # Without a margin there (one answer is the start of the other) nothing excuses the difference.
    margins = plain.margins or ()
    return Comparison(first, margins[first] if first < len(margins) else float("inf"), tie)


def run_demo(
    target: Target,
    drafter: LoadedDrafter,
    *,
    max_new_tokens: int = 128,
    as_json: bool = False,
    prompts: Sequence[DemoPrompt] = PROMPTS,
) -> int:
    """Runs the demo; returns the exit status: 1 where outputs differ by more than a near tie."""
    plain = SpeculativeDecoder(target, margins=True)
    speculative = SpeculativeDecoder(target, drafter, margins=True)
    screen = Screen(drafter)

    def encode(prompt: DemoPrompt) -> list[int]:
        if not prompt.chat:
            return plain.encode(prompt.prompt)
        return target.tokenizer(prompt.prompt, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(decoder: SpeculativeDecoder, prompt: DemoPrompt, on_chunk: Any = None) -> Generation:
        (result,) = decoder.generate(
            [encode(prompt)],
            max_new_tokens=max_new_tokens,
            temperature=prompt.temperature,
            seed=prompt.seed,
            on_chunk=on_chunk,
            rounds_per_chunk=ROUNDS_PER_CHUNK,
            progress=False,  # it would be timed, and drawn across the texts
        )
        return result

    print("Compiling ...", file=sys.stderr, flush=True)
    sizes = {plain.capacity(len(encode(p)), max_new_tokens): p for p in prompts}
    for prompt in sizes.values():
        answer(plain, prompt)
        answer(speculative, prompt)
    seconds = plain.compile_time_s + speculative.compile_time_s
    print(f"Compiled in {seconds:.1f} s.", file=sys.stderr, flush=True)
    if not as_json:
        screen.legend()

    rows = []
    for prompt in prompts:
        if not as_json:
            screen.title(prompt)
            spelled = TextStream(target.tokenizer, prompt=encode(prompt))
            pieces = Pieces(spelled)
            answer(speculative, prompt, lambda chunk, pieces=pieces: screen.show(chunk, pieces))
            screen.end(pieces)
        # Timed apart from the display, which costs each of them a different number of waits.
        slow, fast = answer(plain, prompt), answer(speculative, prompt)
        rows.append(Row(prompt, slow, fast, compare(slow, fast, target.decoder.dtype)))
        if as_json:
            print(json.dumps(_record(rows[-1])), flush=True)
        else:
            screen.comparison(rows[-1])
    if as_json:
        print(json.dumps({"summary": _summary(rows, drafter.spec)}), flush=True)
    else:
        screen.table(rows, drafter.spec)
    if target.decoder.dtype != "float32":
        print(
            f"In {target.decoder.dtype} scores are rounded so far that two tokens within "
            f"{near_tie(target.decoder.dtype):g} of each other may change places when several are verified at "
            "once. Texts may part there; use float32 where they must not.",
            file=sys.stderr,
        )
    return 0 if all(row.found.acceptable for row in rows) else 1


class Row(NamedTuple):
    """One prompt's two answers, compared."""

    prompt: DemoPrompt
    plain: Generation
    speculative: Generation
    found: Comparison


def _record(row: Row) -> dict[str, Any]:
    prompt, plain, speculative, found = row
    return {
        "id": prompt.id,
        "prompt": prompt.prompt,
        "temperature": prompt.temperature,
        "text": speculative.text,
        "token_ids": speculative.token_ids,
        "finish_reason": speculative.finish_reason,
        "identical": found.identical,
        "first_difference": found.first_difference,
        "margin": found.margin if found.margin != float("inf") else None,
        "plain": dataclasses.asdict(plain.stats),
        "stats": dataclasses.asdict(speculative.stats),
    }


def _summary(rows: Sequence[Row], spec: str) -> dict[str, Any]:
    """Medians over the prompts."""
    found = [row.found for row in rows]
    plain = [row.plain.stats.tokens_per_second for row in rows]
    fast = [row.speculative.stats.tokens_per_second for row in rows]
    return {
        "drafter": spec,
        "plain_tokens_per_second": statistics.median(plain),
        "tokens_per_second": statistics.median(fast),
        "speedup": statistics.median(b / a for a, b in zip(plain, fast, strict=True)),
        "mean_acceptance_length": statistics.median(
            row.speculative.stats.mean_acceptance_length for row in rows
        ),
        "identical": sum(c.identical for c in found),
        "near_ties": sum(not c.identical and c.acceptable for c in found),
        "prompts": len(rows),
    }


class Screen:
    """What people see: colours on a terminal, plain text elsewhere."""

    def __init__(self, drafter: LoadedDrafter):
        self.plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
        self.console = Console(
            highlight=False,
            soft_wrap=True,
            force_terminal=False if self.plain else None,
            color_system=None if self.plain else "auto",
        )
        sources = drafter.drafter.info.sources
        self.styles = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sources)}

    def _print(self, text: str = "", style: str = "", end: str = "\n") -> None:
        self.console.print(RichText(text, style="" if self.plain else style), end=end)

    def legend(self) -> None:
        """Which colour is whose."""
        if self.plain or not self.styles:
            return
        self._print("Tokens proposed by ", end="")
        for name, style in self.styles.items():
            self._print(name, style, end=", ")
        self._print("and the target's own in the default colour.")

    def title(self, prompt: DemoPrompt) -> None:
        warm = f" at temperature {prompt.temperature}" if prompt.temperature else ""
        self._print(f"\n== {prompt.id}{warm} ==", "bold")
        self._print(prompt.prompt, "dim", end="")

    def show(self, chunk: Chunk, pieces: Pieces) -> None:
        """Tokens as they come, each in its source's colour."""
        self._show(pieces.push(chunk.token_ids, chunk.sources))

    def end(self, pieces: Pieces) -> None:
        self._show(pieces.finish())
        self._print()

    def _show(self, pieces: Iterator[Piece]) -> None:
        for piece in pieces:
            self._print(piece.text, self.styles.get(piece.source or "", ""), end="")
        self.console.file.flush()

    def comparison(self, row: Row) -> None:
        _, plain, speculative, found = row
        self._print(
            f"-> {found.sentence()} Plain {plain.stats.tokens_per_second:.0f} tokens/s, speculative "
            f"{speculative.stats.tokens_per_second:.0f} tokens/s.",
            "bold" if found.acceptable else "bold red",
        )

    def table(self, rows: Sequence[Row], spec: str) -> None:
        """The comparison of speeds."""
        table = Table(
            title=RichText(
                f"Tokens per second, plain and with {spec}"
            ),  # whose brackets are no markup
            caption="tau: mean acceptance length, tokens per forward pass of the target",
        )
        table.add_column("prompt")
        for name in ("tokens", "plain", "speculative", "ratio", "tau"):
            table.add_column(name, justify="right")
        table.add_column("outputs")
        for prompt, plain, fast, found in rows:
            a, b = plain.stats, fast.stats
            table.add_row(
                RichText(prompt.id),
                str(b.num_tokens),
                f"{a.tokens_per_second:.1f}",
                f"{b.tokens_per_second:.1f}",
                f"{b.tokens_per_second / a.tokens_per_second:.2f}",
                f"{b.mean_acceptance_length:.2f}",
                "identical" if found.identical else "near tie" if found.acceptable else "DIFFERENT",
            )
        total = _summary(rows, spec)
        table.add_section()
        table.add_row(
            "median",
            "",
            f"{total['plain_tokens_per_second']:.1f}",
            f"{total['tokens_per_second']:.1f}",
            f"{total['speedup']:.2f}",
            f"{total['mean_acceptance_length']:.2f}",
            f"{total['identical']} of {total['prompts']}",
        )
        self.console.print()
        self.console.print(table)
