"""A mean with its standard error, as numbers and for a person."""

import math
from collections.abc import Iterable, Sequence

FEW = 16
"""Pairs below which a share of them has a standard error of more than 0.12."""
WIDE = 1.96
"""Standard errors to either side of a mean, for 95 %."""
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


def ends(shares: Iterable[tuple[float | None, int]]) -> str:
    """What a person has to know of shares of 0 or 1, whose standard error is 0: how far off they may be, by Wilson's interval (1927).
    Empty where there are none.

    Args:
        shares: each with how many it is over.
    """
    told = []
    for n, share in sorted({(n, share) for share, n in shares if share in (0, 1) and n}):
        far = WIDE**2 / (n + WIDE**2)
        told.append(f"0 of {n} is at most {far:.3f}" if share == 0 else f"{n} of {n} is at least {1 - far:.3f}")
    return f"± 0 says nothing of 0 or 1: at 95 % (Wilson) the true share behind {', behind '.join(told)}." if told else ""


def cut_off(name: str, share: float, setting: str = "max_new_tokens") -> str:
    """The warning that more than CUT of somebody's responses were cut at the limit that a setting says."""
    return (
        f"{name}: {share:.0%} of the responses were cut at the limit of tokens: raise {setting}, or see whether the policy ends its "
        "responses at all"
    )
