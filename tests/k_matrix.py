"""K matrices (arXiv 2312.11462, Algorithm 1), the form in which cascades were published."""

from collections.abc import Sequence

from jax_specdec.errors import UserError
from jax_specdec.specs.language import CASCADE, Spec, parse


def from_matrix(
    quotas: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    lenience: float = 1.0,
    copies: bool = False,
    cut: bool = False,
) -> Spec:
    """The specification of a K matrix (arXiv 2312.11462, Algorithm 1), as its published code takes it.

    Args:
      quotas: row r is a reviewer, the target first; column c >= r is a proposer, and its entry what the
        proposer adds to the quota, 0 for nothing. names: the proposers, the last one statistical.
      lenience: of every drafter that reviews another neural one, and with `copies` of all that review.

    Raises:
      UserError: not a square upper triangular matrix of non-negative integers with a name for each
        column, or a reviewer without quotas.
    """
    size = len(names)
    if len(quotas) != size or any(len(row) != size for row in quotas):
        raise UserError(f"A K matrix for {size} drafters has {size} rows of {size} quotas.")
    for r, row in enumerate(quotas):
        if any(int(k) != k or k < 0 for k in row) or any(row[:r]):
            raise UserError(
                "A K matrix holds integers of at least 0, and only 0 below its diagonal, got row "
                f"{list(row)}."
            )

    def proposers(row: int) -> tuple[Spec, ...]:
        found = tuple(proposer(row, c) for c in range(row, size) if quotas[row][c])
        if not found:
            raise UserError(f"Row {row} of this K matrix is all 0: nothing would be proposed.")
        return found

    def proposer(row: int, column: int) -> Spec:
        spec = Spec(names[column], int(quotas[row][column]))
        if column == size - 1:
            return spec
        inner = proposers(column + 1)
        neural = any(spec.kind.distribution for spec in inner)
        mild = lenience if neural or copies else 1.0
        return spec._replace(inner=inner, lenience=float(mild), copies=copies, cut=cut)

    return parse(str(Spec(CASCADE, inner=proposers(0), cut=cut)))
