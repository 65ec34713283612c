"""A mean with its standard error, as numbers and for a person."""

import math
from collections.abc import Sequence

FEW = 16
"""Pairs below which a share of them has a standard error of more than 0.12."""
CUT = 0.2
"""Share of responses that were cut, above which is warned."""


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (n - 1 in the variance); None where there are too few values."""
    n = len(values)
    if not n:
        return None, None
    mean = sum(values) / n
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def cell(mean: float | None, error: float | None, digits: int, sign: bool = False) -> str:
    """Both in a cell of a table, as "0.25 ± 0.04", with `sign` as "+0.25 ± 0.04"; empty without a mean."""
    if mean is None:
        return ""
    return f"{mean:{'+' if sign else ''}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def cut_off(name: str, share: float) -> str:
    """The warning that more than CUT of somebody's responses were cut."""
    return (
        f"{name}: {share:.0%} of the responses were cut at the limit of tokens: raise max_new_tokens, or see whether the policy ends its "
        "responses at all"
    )
