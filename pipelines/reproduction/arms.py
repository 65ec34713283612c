"""The arms: what is compared, and the settings among which each one's are chosen. All arms of a table try equally many.

A setting is (learning rate, beta, gamma). The papers' own numbers (lr 5e-7, beta 0.01, gamma 2 on 7 billion weights) mean nothing here:
gamma / beta is the number of nats by which a pointwise loss may lower every log ratio, and short responses have few to give.
"""

from dataclasses import dataclass, replace
from typing import Any

from actors.settings import POINTWISE, Objective

RATES = (1e-4, 3e-5, 3e-4, 1e-5)


@dataclass(frozen=True)
class Setting:
    """What the search chooses."""

    learning_rate: float
    beta: float | None = None
    """None: the preset's"""
    gamma: float | None = None

    def objective(self, preset: str) -> Objective:
        """The objective of a preset with these numbers."""
        given = {"beta": self.beta, "gamma": self.gamma}
        return Objective(name=preset, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Arm:
    """A line of a table."""

    name: str
    """of its stages"""
    preset: str
    data: str
    """what it learns from: "demonstrations", "self_play" (demonstrations against the policy's own samples), "preferences" (pairs of the
    policy's samples that the checker tells apart)"""
    settings: tuple[Setting, ...]
    """in the order in which they are tried: a smaller budget takes the first ones"""
    paper: str = ""
    """the paper's number, as it stands in the table"""


def product(rates: tuple[float, ...], *numbers: tuple[float | None, float | None]) -> tuple[Setting, ...]:
    """Every (beta, gamma) with every rate; those with the first two rates come first."""
    first = [Setting(rate, beta, gamma) for beta, gamma in numbers for rate in rates[:2]]
    return (*first, *(Setting(rate, beta, gamma) for beta, gamma in numbers for rate in rates[2:]))


SFT_SETTINGS = tuple(Setting(rate) for rate in (3e-4, 1e-3, 1e-4, 2e-3, 6e-4, 3e-5, 2e-4, 3e-3))
PAIRWISE = product(RATES, (0.1, None), (0.5, None))
# gamma / beta: 0 and a third of a nat at each rate, then a larger beta and a larger gamma.
POINTWISE_SETTINGS = (*product(RATES[:3], (1.0, 0.0), (3.0, 1.0)), Setting(RATES[0], 3.0, 0.0), Setting(RATES[0], 1.0, 1.0))
# Its margin is in nats, which no number here scales: more rates instead.
MARGIN = tuple(Setting(rate) for rate in (*RATES, 2e-4, 6e-5, 1e-3, 2e-5))
PER_TOKEN = product(RATES, (1.0, None), (4.0, None))


def _gsil(function: str, paper: str = "") -> Arm:
    assert function in POINTWISE
    return Arm(f"gsil-{function}", f"gsil_{function}", "self_play", POINTWISE_SETTINGS, paper)


DPO = Arm("dpo", "dpo", "preferences", PAIRWISE, "below GSIL (Fig. 6)")
GSIL = (
    Arm("sft-longer", "sft", "demonstrations", SFT_SETTINGS, "26.8 / 31.8"),
    Arm("spin", "spin", "self_play", PAIRWISE, "below GSIL"),
    _gsil("logistic", "36.6 / 36.6"),
    _gsil("hinge"),
    _gsil("brier"),
    _gsil("exponential"),
    _gsil("kliep"),
    _gsil("lsif"),
    DPO,
)
"""GSIL Table 2, HumanEval / GSM8K, beside SFT its own numbers."""

DIL = (
    Arm("dil-lsif", "dil_lsif", "preferences", PER_TOKEN, "32.2 / 49.0"),
    Arm("dil-ukl", "dil_ukl", "preferences", PER_TOKEN, "30.7 / 51.0"),
    Arm("dil-bce", "dil_bce", "preferences", PER_TOKEN, "33.1 / 49.4"),
    # The same stages as in the table above.
    replace(DPO, paper="21.8 / 38.7"),
    Arm("ipo", "ipo", "preferences", product(RATES, (0.1, None), (1.0, None)), "27.1 / 22.7"),
    Arm("slic", "slic", "preferences", MARGIN, "33.7 / 48.8"),
    Arm("kto", "kto", "preferences", PAIRWISE, "36.6 / 39.0"),
    Arm("cpo", "cpo", "preferences", PAIRWISE, "33.1 / 46.9"),
    Arm("simpo", "simpo", "preferences", product(RATES, (2.0, 1.0), (10.0, 1.0)), "22.2 / 31.5"),
    Arm("fdpo-forward-kl", "fdpo_forward_kl", "preferences", PAIRWISE, "23.2 / 39.6"),
    Arm("fdpo-js", "fdpo_js", "preferences", PAIRWISE),
)
"""DIL Tables 2 and 4 (GSM8K, Mistral-7B / Llama-3-8B; their SFT policies have 28.1 / 46.3; one f-DPO, whose divergence is not named)."""

AFD = (
    Arm("afd-sft-chosen", "sft", "preferences", SFT_SETTINGS, "about base"),
    Arm("afd-dpo-preference", "dpo", "preferences", PAIRWISE, "below DPO-AfD"),
    Arm("afd-dpo-demonstrations", "dpo", "demonstrations", PAIRWISE, "below SFT"),
)
"""AfD Fig. 3: arms that start from the initial policy."""


def described(setting: Setting) -> dict[str, Any]:
    """A setting as plain values."""
    return {"learning_rate": setting.learning_rate, "beta": setting.beta, "gamma": setting.gamma}
