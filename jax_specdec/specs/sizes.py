"""How long the drafts of a specification can get."""

from typing import Any

from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade_sizes import turns
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.specs.language import CASCADE, Spec


def depth_of(spec: Spec) -> int:
    """The most tokens of a draft, without what an expansion adds; nothing may be left out."""
    return max(_sizes_of(spec), default=0)


def _sizes_of(spec: Spec) -> tuple[int, ...]:
    if spec.name == CASCADE:
        return _turns_of(spec)
    if spec.inner:
        return turns([_reviewed(spec)], [spec.length or 1], [False], cut=False)[1]
    if spec.stop is not None:
        return tuple(range(1, (spec.length or 0) + 1))
    return _statistical(spec).info.sizes if spec.length else ()


def _reviewed(spec: Spec) -> tuple[int, ...]:
    """The sizes of one review."""
    return tuple(range(1, max(_turns_of(spec)) + 2))


def _turns_of(spec: Spec) -> tuple[int, ...]:
    sizes = [_reviewed(inner) if inner.inner else _sizes_of(inner) for inner in spec.inner]
    quotas = [inner.length or 1 for inner in spec.inner]
    return turns(sizes, quotas, [inner.stop is not None for inner in spec.inner], cut=spec.cut)[1]


def _statistical(spec: Spec) -> Any:
    """The drafter of a specification, of which the sizes of its drafts are asked alone."""
    kinds = {"max-gram": MaxGram, "prompt-lookup": PromptLookup}
    return kinds.get(spec.name, Bigram)(spec.length)
