"""The tables: which arms on which data, and the evaluations that each of them reads. Roles of inputs are ARM:SEED:WHAT."""

from collections.abc import Callable, Sequence

from actors.settings import Objective
from pipelines.reproduction.arms import AFD, DIL, GSIL, RATES, Arm, Setting
from pipelines.reproduction.beyond import beyond
from pipelines.reproduction.graph import SAMPLED, SEVERAL, Builder, Seed
from pipelines.reproduction.reward_plan import afd_rewards
from pipelines.run.artifacts import Stage

GRID_BETAS, GRID_GAMMAS = (0.1, 0.3, 1.0, 3.0), (0.0, 0.3, 1.0, 2.0)


def gsil(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """GSIL Table 2 and Fig. 2: self-play arms, SFT for longer, DPO on the checker's preferences, all from one SFT policy a seed."""
    inputs: dict[str, Stage] = {}
    arms = wanted(GSIL, builder.config.scope.arms)
    for seed in seeds:
        builder.tested(inputs, seed, "pre-trained", seed.pretrained, "0")
        builder.tested(inputs, seed, "sft", seed.sft, "0")
        for arm in arms:
            for t, policy in enumerate(builder.iterated(arm, seed, builder.config.scope.iterations), start=1):
                builder.tested(inputs, seed, arm.name, policy, str(t))
                inputs[f"{arm.name}:{seed.number}:training-{t}"] = policy
    return builder.table("gsil", inputs, arms=[arm.name for arm in arms], papers={arm.name: arm.paper for arm in arms})


def gsil_grid(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """GSIL Fig. 7: the logistic loss over beta and gamma at one learning rate, one iteration, on validation problems."""
    inputs: dict[str, Stage] = {}
    arm = next(arm for arm in GSIL if arm.name == "gsil-logistic")
    # A grid shows a shape: two seeds of it cost as much as four arms of the table.
    for seed in seeds[:2]:
        rows = builder.rows_of(arm, seed, seed.sft, f"seed-{seed.number}/sft")
        for beta in GRID_BETAS:
            for gamma in GRID_GAMMAS:
                name = f"seed-{seed.number}/grid/beta-{beta:g}-gamma-{gamma:g}"
                objective = Setting(RATES[0], beta, gamma).objective(arm.preset)
                own = builder.config.training.model_copy(update={"learning_rate": RATES[0]})
                policy = builder.training(f"{name}/training", seed.sft, rows, own, objective, seed=seed.number)
                inputs[f"{beta:g}/{gamma:g}:{seed.number}:1"] = builder.evaluated(name, policy, seed.demonstrations)
        inputs[f"sft:{seed.number}:0"] = builder.evaluated(f"seed-{seed.number}/sft/validation", seed.sft, seed.demonstrations)
    return builder.table("gsil_grid", inputs, betas=list(GRID_BETAS), gammas=list(GRID_GAMMAS), learning_rate=RATES[0])


def dil(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """DIL Tables 2 and 4 and Fig. 2: objectives on the same preference pairs, one pass over the same SFT policy."""
    inputs: dict[str, Stage] = {}
    arms = wanted(DIL, builder.config.scope.arms)
    for seed in seeds:
        builder.tested(inputs, seed, "sft", seed.sft, "0")
        for arm in arms:
            (policy,) = builder.iterated(arm, seed, 1)
            builder.tested(inputs, seed, arm.name, policy)
            inputs[f"{arm.name}:{seed.number}:training-1"] = policy
    return builder.table("dil", inputs, arms=[arm.name for arm in arms], papers={arm.name: arm.paper for arm in arms})


def afd(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """AfD Fig. 3: what to do with demonstrations, or with preferences, from the initial policy. SFT takes all of its passes; so do they."""
    inputs: dict[str, Stage] = {}
    training = builder.sft_training()
    for seed in seeds:
        builder.tested(inputs, seed, "base", seed.pretrained, "0")
        builder.tested(inputs, seed, "sft", seed.sft, "0")
        name = f"seed-{seed.number}/pretraining"
        for arm in AFD:
            rows = _afd_rows(builder, arm, seed, name)
            choice = builder.tried(arm, seed.pretrained, rows, seed.demonstrations, training)
            preset = arm.settings[0].objective(arm.preset)
            trained = f"seed-{seed.number}/{arm.name}/training"
            policy = builder.training(trained, seed.pretrained, rows, training, preset, choice, seed.number)
            builder.tested(inputs, seed, arm.name, policy)
            inputs[f"{arm.name}:{seed.number}:training-1"] = policy
    return builder.table("afd", inputs, arms=[arm.name for arm in AFD], papers={arm.name: arm.paper for arm in AFD})


def _afd_rows(builder: Builder, arm: Arm, seed: Seed, name: str) -> Stage:
    """Preference pairs are of samples of the initial policy, as people's are of responses that are there before."""
    if arm.data == "demonstrations":
        negatives = builder.samples(f"{name}/negatives", seed.pretrained, seed.demonstrations, SAMPLED)
        return builder.pairs(f"{name}/pairs", seed.demonstrations, [negatives], seed.pretrained, Objective(name="dpo"))
    told_apart = builder.preferences(name, seed.pretrained, seed.prompts, SEVERAL)
    if arm.preset == "sft":
        # Its rows are demonstrations too: the chosen side.
        return told_apart
    return builder.pairs(f"{name}/preference-pairs", told_apart, (), seed.pretrained, Objective(name="dpo"))


def wanted(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """Those that were asked for."""
    return [arm for arm in arms if names is None or arm.name in names]


PLANS: dict[str, Callable[[Builder, Sequence[Seed]], Stage]] = {
    "gsil": gsil,
    "gsil_grid": gsil_grid,
    "dil": dil,
    "afd": afd,
    "afd_rewards": afd_rewards,
    "beyond": beyond,
}
