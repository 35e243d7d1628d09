"""The language of `--drafter`: what is asked for, before any checkpoint is opened.

lm:4                                          a drafter and its draft length
lm:4+cape:16                                  an expansion and its node budget
lm[confidence=0.4]:8                          drafts end behind tokens that it is unsure of; also entropy=
medusa:3+static:16                            Medusa's tree, chosen by the accuracies of its checkpoint
lm[max-gram:10]                               lm verifies what max-gram drafts
cascade(lm[max-gram:10]:2, max-gram:10)       drafters in turn, each with its budget
lm[lm2[max-gram:10]:1, max-gram:10; lenience=3]:8     any nesting, with options behind semicolons
cascade, first                                the one that `jax-specdec tune` chose for the checkpoint
first(max-gram[match=2]:12, glide:4)          of some drafters the first that finds something; matches of two tokens
                                              at least
"""

import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lark

from jax_specdec.drafters import registry
from jax_specdec.errors import UserError, a_kind, shown, shown_value
from jax_specdec.specs.presets import PRESETS

OPTIONS = ("lenience", "copies", "cut")
STOPS = ("confidence", "entropy")
MATCH = "match"
CASCADE, FIRST = "cascade", "first"
COMBINATIONS = (CASCADE, FIRST)
EXAMPLE = "cascade(lm[max-gram:10]:2, max-gram:10)"
EXAMPLES = {CASCADE: EXAMPLE, FIRST: "first(max-gram:12, lm:4)"}
# Longer or deeper ones mean nothing: a draft has 63 tokens at most.
MOST_CHARACTERS, MOST_LEVELS = 1000, 16
MOST_MATCH = 16


GRAMMAR = r"""
start: (turns | item) ("+" rule)*
turns: NAME "(" items options ")"
item: NAME [verify | unsure] [":" INT]
unsure: "[" NAME "=" NUMBER "]"
verify: "[" items options "]"
items: item ("," item)*
options: (";" option)*
option: NAME ["=" NUMBER]
rule: [NAME [":" INT]]
NAME: /[a-z][a-z0-9-]*/
INT: /-?\d+/
NUMBER: /-?\d+(\.\d+)?/
%ignore /\s+/
"""


class Spec(NamedTuple):
    """A parsed specification; `str` gives it back. None stands for the default.

    Attributes:
      length: tokens per draft, or the budget of a drafter that verifies.
      inner: the drafters whose draft it verifies, or those of a combination.
      lenience, copies, cut: as in `drafters.cascade`. stop: as in `drafters.early_exit.Stop`.
      match: as `min_match` in `drafters.max_gram`.
    """

    name: str
    length: int | None = None
    rule: str | None = None
    nodes: int | None = None
    inner: tuple["Spec", ...] = ()
    lenience: float = 1.0
    copies: bool = False
    cut: bool = False
    stop: tuple[Any, float] | None = None
    match: int = 1

    @property
    def kind(self) -> registry.Kind:
        """Not of a combination, which is made of others."""
        return registry.of(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """The drafters that it is made of, each once."""
        own = () if self.name in COMBINATIONS else (self.name,)
        return tuple(dict.fromkeys((*own, *(name for part in self.inner for name in part.names))))

    @property
    def key(self) -> str:
        """What measured defaults are filed under."""
        return self.name if self.rule is None else f"{self.name}+{self.rule}"

    @property
    def verifies(self) -> bool:
        """Whether it verifies what others draft."""
        return bool(self.inner) and self.name not in COMBINATIONS

    @property
    def has_distribution(self) -> bool:
        if self.name == FIRST:
            return False
        if self.name == CASCADE:  # without drafters: the one that was chosen by measurement
            return not self.inner or any(inner.has_distribution for inner in self.inner)
        return self.kind.distribution

    def __str__(self) -> str:
        def item(name: str, count: int | None) -> str:
            return name if count is None else f"{name}:{count}"

        inside = ", ".join(map(str, self.inner))
        if self.lenience != 1:
            inside += f"; lenience={_number(self.lenience)}"
        inside += "; copies" * self.copies + "; cut" * self.cut
        if self.name in COMBINATIONS:
            text = f"{self.name}({inside})" if self.inner else self.name
        else:
            if self.stop is not None:
                inside = f"{self.stop[0]}={_number(self.stop[1])}"
            if self.match > 1:
                inside = f"{MATCH}={self.match}"
            text = item(f"{self.name}[{inside}]" if inside else self.name, self.length)
        return text if self.rule is None else f"{text}+{item(self.rule, self.nodes)}"


def _number(value: float) -> str:
    """The shortest text that is read as the same number."""
    return str(int(value)) if value == int(value) else repr(value)


def parse(text: str) -> Spec:
    """The specification that a text stands for, a preset's name included.

    Raises:
      UserError: no text, wrong syntax, with the place, or an unknown drafter or option, with the nearest
        ones. Whether lengths and budgets make sense is not looked at.
    """
    if not isinstance(text, str):
        hint = ": SpeculativeDecoder takes one that is loaded" if hasattr(text, "spec") else ""
        raise UserError(f"A drafter is named by a text, as in 'lm:4', not {a_kind(text)}{hint}.")
    _check_size(text)
    chain, plus, rule = text.partition("+")
    if chain.strip() in PRESETS:
        chain = PRESETS[chain.strip()]
        if plus and "+" in chain:
            raise UserError(f"The preset {text.partition('+')[0].strip()!r} is expanded already.")
        return parse(chain + plus + rule)
    if chain.strip() in COMBINATIONS:
        return parse(f"lm{plus}{rule}")._replace(name=chain.strip())
    try:
        return _Build().transform(_parser().parse(text))
    except lark.exceptions.VisitError as error:
        raise error.orig_exc from None
    except lark.exceptions.UnexpectedInput as error:
        name = chain.partition(":")[0].strip()
        if not set("([])") & set(text) and registry.find(name) is None:
            known_name(name, "drafter", (*registry.names(), *PRESETS))
        token: Any = getattr(error, "token", None)
        ended = token is not None and token.type == "$END"
        column = error.column
        rest = "" if ended else text[column - 1 :]
        what = f"has an unexpected {rest[0]!r} at character {column}" if rest else "ends too early"
        raise UserError(
            f"The drafter {shown(text)} {what}: it should read like {EXAMPLE}."
        ) from None


def _check_size(text: str) -> None:
    """Raises `UserError` for a text that no drafter needs, before it is read any further."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"The drafter {shown(text)} has {len(text):,} characters, and {MOST_CHARACTERS:,} is the most."
        )
    depth = 0
    for place, character in enumerate(text, 1):
        depth += (character in "[(") - (character in ")]")
        if depth > MOST_LEVELS:
            raise UserError(
                f"The drafter {shown(text)} nests deeper than {MOST_LEVELS} brackets at character {place}."
            )


def split(text: str) -> list[str]:
    """The specifications of a list with commas; commas inside brackets do not separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def folders_by_name(drafts: Mapping[str, Any] | None) -> dict[str, Any]:
    """`{name: folder or hub id}` of drafters' checkpoints, none where None is given.

    Raises:
      UserError: another form, or the name of no drafter that has a checkpoint.
    """
    if drafts is None:
        return {}
    form = 'Checkpoints of drafters are given by name, as in {"lm": "FOLDER"}'
    if not isinstance(drafts, Mapping):
        raise UserError(f"{form}, not as {a_kind(drafts)}.")
    for name, folder in drafts.items():
        if not isinstance(name, str) or not isinstance(folder, (str, os.PathLike)) or not folder:
            raise UserError(f"{form}, got {shown_value(name)}: {shown_value(folder)}.")
        kind = registry.find(name)
        if kind is None:
            known_name(name, "drafter", registry.names("needs_checkpoint"))
        elif not kind.needs_checkpoint:
            able = registry.listed(registry.names("needs_checkpoint"))
            raise UserError(f"The drafter {name!r} has no checkpoint; {able} have one.")
    return dict(drafts)


@functools.cache
def _parser() -> lark.Lark:
    return lark.Lark(GRAMMAR, parser="lalr", maybe_placeholders=True)


def known_name(name: str, what: str, known: Sequence[str]) -> str:
    """The name, if it is one of the known.

    Raises:
      UserError: it is not; the nearest ones are named.
    """
    if name in known:
        return name
    close = difflib.get_close_matches(name[:80], known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."
    raise UserError(f"Unknown {what} {shown(name)}: {hint}")


def _short(token: lark.Token) -> str:
    if len(token) > 20:
        raise UserError(
            f"The number {shown(token, 20)} at character {token.column} of the drafter is too long."
        )
    return str(token)


def _tokens(value: float) -> int:
    if value != int(value) or not 1 <= value <= MOST_MATCH:
        raise UserError(f"A match is of 1 to {MOST_MATCH} tokens, got {_number(value)}.")
    return int(value)


class _Build(lark.Transformer):
    """From the syntax tree to a `Spec`."""

    def NAME(self, token):
        return str(token)

    def INT(self, token):
        return int(_short(token))

    def NUMBER(self, token):
        return float(_short(token))

    def items(self, children):
        return tuple(children)

    def option(self, children):
        name, value = children
        known_name(name, "option", OPTIONS)
        if (value is None) == (name == "lenience"):
            raise UserError(
                "A lenience is a number, as in lenience=3."
                if value is None
                else f"The option {name!r} takes no value."
            )
        return name, True if value is None else value

    def options(self, children):
        return dict(children)

    def verify(self, children):
        return children

    def unsure(self, children):
        name, value = children
        known_name(name, "option", (*STOPS, MATCH))
        return {MATCH: value} if name == MATCH else {"stop": (name, value)}

    def item(self, children):
        name, verify, length = children
        kind = registry.find(name)
        if kind is None:
            known_name(name, "drafter", registry.names() if verify else self._all_names())
            raise UserError(
                f"The preset {name!r} takes no length and stands alone, not among drafters."
            )
        spec = Spec(name, length)
        if verify is None:
            return spec
        if isinstance(verify, dict):
            if MATCH in verify:
                if not kind.matches:
                    able = registry.listed(registry.names("matches"))
                    raise UserError(f"The drafter {shown(name)} takes no `{MATCH}`: {able} does.")
                return spec._replace(match=_tokens(verify[MATCH]))
            if not kind.ends_early:
                raise UserError(
                    f"The drafter {shown(name)} has no probabilities to stop a draft by."
                )
            return spec._replace(**verify)
        if not kind.verifies:
            able = registry.listed(registry.names("verifies"))
            raise UserError(
                f"The drafter {shown(name)} cannot verify: {able} can, as in lm[{name}:4]."
            )
        inner, options = verify
        return spec._replace(inner=_drafting(inner), **options)

    def _all_names(self) -> tuple[str, ...]:
        return (*registry.names(), *PRESETS)

    def turns(self, children):
        name, inner, options = children
        known_name(name, "combination", COMBINATIONS)
        if name == FIRST:
            if options:
                raise UserError(f"`{FIRST}` takes no option, got {next(iter(options))!r}.")
            return Spec(FIRST, inner=_drafting(inner))
        if "lenience" in options or "copies" in options:
            raise UserError(
                "The target takes no lenience, which would change its output: a verifying drafter does, "
                "as in lm[max-gram:10; lenience=3]."
            )
        return Spec(CASCADE, inner=_drafting(inner), **options)

    def rule(self, children):
        name, nodes = (*children, None, None)[:2]
        return name or "", nodes

    def start(self, children) -> Any:
        spec, *rules = children
        if len(rules) > 1:
            more = "+".join(name for name, _ in rules)
            raise UserError(f"Unknown expansion {more!r}: a drafter takes one.")
        return spec._replace(rule=rules[0][0], nodes=rules[0][1]) if rules else spec


def _drafting(inner: tuple[Spec, ...]) -> tuple[Spec, ...]:
    for spec in inner:
        if not spec.inner and not spec.kind.usual_length:
            raise UserError(f"The drafter {spec.name!r} drafts nothing: leave it out.")
    return inner
