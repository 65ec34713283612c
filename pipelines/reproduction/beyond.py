"""What the papers leave open about GSIL: every variant changes one thing of the logistic arm, and keeps its chosen setting and its order of
rows."""

from collections.abc import Sequence

from actors.settings import Objective
from pipelines.reproduction.arms import GSIL
from pipelines.reproduction.graph import METRIC, SEVERAL, Builder, Seed
from pipelines.reproduction.settings import Problems
from pipelines.run.artifacts import Stage

LONGER_SFT, ARM = (next(arm for arm in GSIL if arm.name == name) for name in ("sft-longer", "gsil-logistic"))
WRONG = (0.1, 0.2, 0.3, 0.4)
LONGER = 4
"""Digits, operations and clauses of a problem longer than any demonstration."""
AGAINST = {
    "sft": "",
    "iteration 1": "sft",
    "iteration 2": "sft",
    "greedy negatives": "iteration 1",
    "4 samples a prompt": "iteration 1",
    "window 2": "iteration 2",
    "reference initial": "iteration 2",
    "best of 4 distilled": "sft",
    **{f"{what}, {share:.0%} wrong": "sft" if what == "sft" else f"sft, {share:.0%} wrong" for share in WRONG for what in ("sft", "gsil")},
    "longer problems, sft": "",
    "longer problems, iteration 2": "longer problems, sft",
}
"""Each variant with what it is compared with."""


def beyond(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """All variants on all seeds."""
    inputs: dict[str, Stage] = {}
    for seed in seeds:
        _variants(builder, inputs, seed)
    return builder.table("beyond", inputs, against=AGAINST)


def _variants(builder: Builder, inputs: dict[str, Stage], seed: Seed) -> None:
    name, objective = f"seed-{seed.number}/beyond", ARM.settings[0].objective(ARM.preset)
    first, second = builder.iterated(ARM, seed, 2)
    choice = builder.steps[f"search/{ARM.name}/choice"].stage
    demonstrations = seed.demonstrations

    def tested(variant: str, policy: Stage, test: Stage = seed.test, where: str = "test") -> None:
        stem = policy.name.removesuffix("/training")
        inputs[f"{variant}:{seed.number}:1"] = builder.evaluated(f"{stem}/{where}", policy, test)

    def trained(variant: str, start: Stage, rows: Stage, negatives: Sequence[Stage], reference: Stage, iteration: int = 1) -> Stage:
        stem = f"{name}/{variant.replace(' ', '-').replace(',', '').replace('%', '')}"
        pairs = builder.pairs(f"{stem}/pairs", rows, negatives, reference, objective)
        order = 100 * seed.number + iteration
        return builder.training(f"{stem}/training", start, pairs, builder.config.training, objective, choice, order)

    drawn = [builder.negatives(f"seed-{seed.number}/sft", seed.sft, demonstrations, 1)]
    drawn.append(builder.negatives(first.name.removesuffix("/training"), first, demonstrations, 2))
    greedy = builder.samples(f"{name}/greedy/negatives", seed.sft, demonstrations, METRIC.sampling(), iteration=1)
    several = builder.samples(f"{name}/several/negatives", seed.sft, demonstrations, SEVERAL, iteration=1)
    tested("sft", seed.sft)
    tested("iteration 1", first)
    tested("iteration 2", second)
    tested("greedy negatives", trained("greedy negatives", seed.sft, demonstrations, [greedy], seed.sft))
    tested("4 samples a prompt", trained("4 samples", seed.sft, demonstrations, [several], seed.sft))
    tested("window 2", trained("window 2", first, demonstrations, drawn, first, 2))
    tested("reference initial", trained("reference initial", first, demonstrations, drawn[1:], seed.sft, 2))
    tested("best of 4 distilled", _distilled(builder, seed, name))
    for share in WRONG:
        rows = builder.demonstrations(seed.number, f"wrong-{100 * share:.0f}", careless=share)
        own, sft_choice = builder.sft_training(), builder.steps["search/sft/choice"].stage
        stem = f"{name}/wrong-{100 * share:.0f}"
        sft = builder.training(f"{stem}/sft/training", seed.pretrained, rows, own, Objective(name="sft"), sft_choice, seed.number)
        negatives = builder.negatives(f"{stem}/sft", sft, rows, 1)
        tested(f"sft, {share:.0%} wrong", sft)
        tested(f"gsil, {share:.0%} wrong", trained(f"wrong {share:.0%}", sft, rows, [negatives], sft))
    longer = Problems(count=builder.config.problems.test, split="test", lengths=[LONGER])
    test = builder.problems(f"seed-{seed.number}/data/longer", seed.number, held_out=longer)
    tested("longer problems, sft", seed.sft, test, "longer")
    tested("longer problems, iteration 2", second, test, "longer")


def _distilled(builder: Builder, seed: Seed, name: str) -> Stage:
    """SFT on samples that the checker chose, of prompts where it had a choice: the oracle's Best-of-N, distilled."""
    rows = builder.preferences(f"seed-{seed.number}/sft", seed.sft, seed.prompts, SEVERAL, 1)
    choice = builder.tried(LONGER_SFT, seed.sft, seed.demonstrations, seed.demonstrations)
    order = 100 * seed.number + 1
    return builder.training(f"{name}/distilled/training", seed.sft, rows, builder.config.training, Objective(name="sft"), choice, order)
