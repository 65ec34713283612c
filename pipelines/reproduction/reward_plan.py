"""AfD Fig. 4 and Table 2: which data a reward model is made of, and what Best-of-N with it is worth.

The demonstrations are in one style of three that the initial policy writes: whoever compares them with its samples can tell who wrote
what without reading the working, which is the paper's reason for init-sft.
"""

from collections.abc import Sequence

from actors.settings import Objective, Sampling
from pipelines import best_of_n, policy_training, reward_training, scoring
from pipelines.reproduction.graph import METRIC, NEW_TOKENS, SEVERAL, Builder, Seed
from pipelines.reproduction.settings import Problems
from pipelines.run.artifacts import Stage
from pipelines.settings import Combination

KINDS = ("init-sft", "init-demo", "sft-demo", "bt")
GOLDEN = "regex:####(.*)"
MANY = Sampling(max_new_tokens=NEW_TOKENS, samples=32, seed=2)
BOTH = ("train", "held_out")


def afd_rewards(builder: Builder, seeds: Sequence[Seed]) -> Stage:
    """Four reward models a seed; each chooses among the same 32 samples of the SFT policy for test problems."""
    inputs: dict[str, Stage] = {}
    for seed in seeds:
        inputs[f"results:{seed.number}:1"] = _results(builder, seed, f"seed-{seed.number}/rewards")
    return builder.table("afd_rewards", inputs, kinds=list(KINDS))


def _results(builder: Builder, seed: Seed, name: str) -> Stage:
    config, sets = builder.config, builder.config.problems
    train = Problems(count=sets.demonstrations, styles=["verbose"])
    test = Problems(count=max(3, sets.test // 3), split="test", styles=["verbose"])
    rows = builder.problems(f"{name}/data", seed.number, train=train, held_out=test)
    choice = builder.steps["search/sft/choice"].stage
    sft = builder.training(
        f"{name}/sft/training", seed.pretrained, rows, builder.sft_training(), Objective(name="sft"), choice, seed.number
    )
    base_responses = builder.samples(f"{name}/base/responses", seed.pretrained, rows, SEVERAL, *BOTH)
    responses = builder.samples(f"{name}/sft/responses", sft, rows, SEVERAL, *BOTH)
    many = builder.samples(f"{name}/sft/many", sft, rows, MANY, "held_out")
    greedy = builder.samples(f"{name}/sft/greedy", sft, rows, METRIC.sampling(), "held_out")
    base_greedy = builder.samples(f"{name}/base/greedy", seed.pretrained, rows, METRIC.sampling(), "held_out")

    def score(what: str, given: Stage, scorer: Stage | str, *splits: str) -> Stage:
        stage = scoring.plan(f"{name}/scores/{what}", given, rows, scorer, "float32", config.scoring, splits or ("held_out",))
        return builder.add("scores", stage)

    labels = score("labels", responses, GOLDEN, *BOTH)
    sides = {
        "init-sft": (responses, base_responses),
        "init-demo": (rows, base_responses),
        "sft-demo": (rows, responses),
        "bt": (responses, responses),
    }
    rewards = {}
    for kind in KINDS:
        pairs = reward_training.plan_pairs(f"{name}/{kind}/pairs", *sides[kind], labels if kind == "bt" else None)
        builder.add("reward_pairs", pairs)
        objective = reward_training.objective("bradley_terry" if kind == "bt" else "binary")
        own = config.rewards.model_copy(update={"seed": seed.number})
        trained = policy_training.plan(f"{name}/{kind}/training", seed.pretrained, builder.base, pairs, own, objective, responses)
        rewards[kind] = score(kind, many, builder.add("training", trained))
    golden = best_of_n.Golden(
        samples=score("golden", many, GOLDEN),
        greedy=score("golden-greedy", greedy, GOLDEN),
        base=score("golden-base", base_greedy, GOLDEN),
        demonstrations=score("golden-demonstrations", rows, GOLDEN),
    )
    selectors = {kind: [kind] for kind in KINDS}
    return builder.add("best_of_n", best_of_n.plan(many, golden, rewards, selectors, KINDS[0], Combination(), f"{name}/results"))
