"""The objectives by name."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # GSIL, arXiv 2410.10093. Its released run has beta 0.01 and gamma 2.
    "gsil_logistic": {"function": "logistic", "beta": 0.1},
    "gsil_hinge": {"function": "hinge", "beta": 0.1},
    "gsil_brier": {"function": "brier", "beta": 0.1},
    "gsil_exponential": {"function": "exponential", "beta": 0.1},
    "gsil_kliep": {"function": "kliep", "beta": 0.1},
    "gsil_lsif": {"function": "lsif", "beta": 0.1},
    # DIL, ICLR 2025: no hyper-parameters, log ratios per token.
    "dil_lsif": {"function": "lsif", "beta": 1.0, "length_normalised": True},
    "dil_ukl": {"function": "kliep", "beta": 1.0, "length_normalised": True},
    "dil_bce": {"function": "logistic", "beta": 1.0, "length_normalised": True},
    # What the papers compare with, with their authors' usual numbers.
    "spin": {"function": "dpo", "beta": 0.1},
    "dpo": {"function": "dpo", "beta": 0.1},
    "fdpo_reverse_kl": {"function": "dpo", "beta": 0.1},
    "fdpo_forward_kl": {"function": "fdpo_forward_kl", "beta": 0.1},
    "fdpo_js": {"function": "fdpo_js", "beta": 0.1},
    "fdpo_alpha": {"function": "fdpo_alpha", "beta": 0.1, "alpha": 0.5},
    "ipo": {"function": "ipo", "beta": 0.1, "length_normalised": True},
    "slic": {"function": "slic", "beta": 0.1, "delta": 1.0, "sft_weight": 1.0},
    "cpo": {"function": "cpo", "beta": 0.1, "sft_weight": 1.0},
    "simpo": {"function": "simpo", "beta": 2.0, "gamma": 1.0},
    "kto": {"function": "kto", "beta": 0.1},
    "sft": {"function": "sft", "sft_weight": 1.0},
}
"""Names for a function of the table in actors/learner/objectives.py and its numbers."""
