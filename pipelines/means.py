"""A mean with its standard error, as numbers and for a person."""

import math
from collections.abc import Mapping, Sequence

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


def ends(shares: Mapping[str, tuple[float | None, int]]) -> str:
    """What a person has to know of shares of 0 or 1, whose standard error is 0: how far off they may be, by Wilson's interval (1927).
    Empty where there are none.

    Args:
        shares: and how many each is over, by name.
    """
    room = {name: (mean, WIDE**2 / (n + WIDE**2)) for name, (mean, n) in shares.items() if mean in (0, 1) and n}
    told = [f"{name} {f'at most {far:.3f}' if mean == 0 else f'at least {1 - far:.3f}'}" for name, (mean, far) in room.items()]
    return f"Of a share of 0 or 1, ± 0 says nothing; at 95 % (Wilson) the true one is: {', '.join(told)}." if told else ""


def cut_off(name: str, share: float, setting: str = "max_new_tokens") -> str:
    """The warning that more than CUT of somebody's responses were cut at the limit that a setting says."""
    return (
        f"{name}: {share:.0%} of the responses were cut at the limit of tokens: raise {setting}, or see whether the policy ends its "
        "responses at all"
    )
