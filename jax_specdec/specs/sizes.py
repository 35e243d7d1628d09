"""How long the drafts of a specification can get, by the algebra of `drafters.cascade_sizes`."""

from jax_specdec.drafters.cascade_sizes import ended_early, turns, verified
from jax_specdec.specs.language import CASCADE, FIRST, Spec


def depth_of(spec: Spec) -> int:
    """The most tokens of a draft, without what an expansion adds; nothing may be left out."""
    return max(_whole(spec), default=0)


def _whole(spec: Spec) -> tuple[int, ...]:
    if spec.verifies:  # several verifications for one draft
        return turns([_sizes(spec)], [spec.length or 1], [False], cut=False)[1]
    return _sizes(spec)


def _sizes(spec: Spec) -> tuple[int, ...]:
    """The sizes of one call."""
    if spec.name == CASCADE:
        return _turns(spec)
    if spec.name == FIRST:
        return tuple(sorted({size for inner in spec.inner for size in _whole(inner)}))
    if spec.inner:
        return verified(_turns(spec))
    if not spec.length:
        return ()
    return ended_early(spec.length) if spec.stop is not None else spec.kind.sizes(spec.length)


def _turns(spec: Spec) -> tuple[int, ...]:
    sizes = [_sizes(inner) for inner in spec.inner]
    budgets = [inner.length or 1 for inner in spec.inner]
    return turns(sizes, budgets, [inner.stop is not None for inner in spec.inner], cut=spec.cut)[1]
