"""What a run found: summary.json, the table, warnings, and final/ with its model card."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.settings import Objective
from pipelines import base_model
from pipelines.means import CUT, FEW, cell, cut_off
from pipelines.run.artifacts import Run, Stage
from pipelines.run.manifests import read_json, versions, write_json
from pipelines.tables import Shown, Table, filled, ruled

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


def iteration_numbers(pairs: Mapping[str, Any], negatives: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `iterations` in the summary, from the numbers in the manifests of the three stages (of pairs that were given,
    `negatives` has their number alone).

    Negatives and cut ones among them are those of both splits, rejected pairs those that would have been trained on.
    Rewards (beta * rho, nats x beta), margin and classification accuracy are the trained policy's on held-out pairs.
    """
    train, held_out = pairs["train"], training.get("held_out", {})
    return {
        "negatives": negatives["rows"],
        "truncated": negatives.get("truncated", 0),
        "rejected": train.get("identical", 0) + train.get("dropped", 0),
        "reward_real": held_out.get("reward_real"),
        "reward_generated": held_out.get("reward_generated"),
        "margin": held_out.get("margin"),
        "classification_accuracy": held_out.get("accuracy"),
        "held_out_pairs": held_out.get("rows", 0),
        "held_out_prompts": held_out.get("prompts", held_out.get("rows", 0)),
    }


def reward_warnings(name: str, training: dict[str, Any], objective: Objective) -> list[str]:
    """Warns when the reward of real responses fell below zero by two standard errors over the last steps, or heads for -gamma: what
    cannot be told apart ends there."""
    reward, gamma = training.get("tail_reward_real"), objective.gamma if objective.pointwise else 0.0
    if reward is None or reward >= -2 * (training.get("tail_reward_real_stderr") or 0.0):
        return []
    if gamma > 0 and reward < -0.5 * gamma:
        return [
            f"{name}: the reward of real responses heads for -gamma ({reward:.3f} of -{gamma:g}): the objective is pushing every log "
            "ratio to the zero of its score, real and generated alike. Lower objective.gamma, the learning rate or the epochs"
        ]
    return [f"{name}: the reward of real responses stays below zero ({reward:.3f}): the policy is moving away from the demonstrations"]


def set_aside(name: str, numbers: Mapping[str, Any]) -> list[str]:
    """Warns of rows that could not be used, by the numbers of the stage `name` that read them."""
    if not numbers.get("rejected"):
        return []
    return [f"{name}: {numbers['rejected']} of {numbers['read']} rows were set aside; {name}/rejected.parquet says why"]


def cut(name: str, numbers: dict[str, Any]) -> list[str]:
    """Warns of samples of which many were cut, by the numbers of the stage `name` that drew them."""
    share = numbers.get("truncated", 0) / max(1, numbers.get("rows", 0))
    return [cut_off(name, share)] if share > CUT else []


def indistinguishable(numbers: dict[str, Any]) -> bool:
    """Whether held-out pairs are told apart no better than by chance: accuracy within two standard errors of one half. Several samples of
    a prompt share its demonstration: it is prompts that are independent."""
    accuracy, n = numbers["classification_accuracy"], numbers["held_out_prompts"]
    return bool(n) and abs(accuracy - 0.5) <= 2 * (0.25 / n) ** 0.5


def doubts(name: str, numbers: dict[str, Any], pairs: int) -> list[str]:
    """Warns of an iteration that taught nothing, or of which nobody can say.

    Args:
        name: of the policy.
        numbers: its `iteration_numbers`.
        pairs: that it was trained on.
    """
    found, accuracy = [], numbers["classification_accuracy"]
    if accuracy is not None and accuracy < 0.5 and not indistinguishable(numbers):
        found.append(f"{name}: held-out pairs are told apart worse than by chance ({accuracy:.3f} of {numbers['held_out_pairs']})")
    if numbers["held_out_pairs"] < FEW:
        few = f"{numbers['held_out_pairs']} held-out pairs, fewer than {FEW},"
        found.append(f"{name}: {few} cannot say whether demonstrations and samples are told apart")
    if pairs < FEW or pairs < numbers["rejected"]:
        found.append(f"{name}: trained on {pairs} pairs, {numbers['rejected']} were dropped as equal to their demonstration or cut")
    return found


def show(content: dict[str, Any], root: Path) -> Shown:
    """The final table of a job that trains policies, and where everything is.

    Args:
        content: what summary.json holds.
        root: the run directory.
    """
    stopped = [f"stopped early: {content['stopped']}"] if content["stopped"] else []
    warnings = [f"warning: {text}" for text in content["warnings"]]
    compared = any(numbers["n"] for numbers in content["policies"].values())
    final = content["final"] if compared else f"{content['final']} (the last one: no metric compares the policies)"
    places = [f"final policy: {final}, {root / 'final'}", f"summary: {root / 'summary.json'}"]
    rows = table(content["policies"], _by_policy(content), content["gains"])
    return Shown([Table(f"{content['run']}: held-out prompts", rows, content["final"])], [*stopped, *warnings, *places])


def _by_policy(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `iterations` of a summary, each under the policy that it made."""
    return dict(zip([name for name in content["policies"] if name not in ("base", "sft")], content["iterations"], strict=True))


def table(
    policies: dict[str, dict[str, Any]], iterations: Mapping[str, dict[str, Any]], gains: Mapping[str, dict[str, Any]]
) -> list[list[str]]:
    """Rows of the final table, the header first; columns are there where something was measured.

    Args:
        policies: numbers of the evaluation by policy.
        iterations: `iteration_numbers` by policy, of those that were trained to tell pairs apart.
        gains: on the policy before, by policy.
    """
    measured = any(numbers["n"] for numbers in policies.values())
    compared = any(gain["n"] for gain in gains.values())
    accuracy = [*(["accuracy", "±", "n"] if measured else []), *(["gain on the one before"] if compared else [])]
    rows = [["policy", *accuracy, "reward real", "generated", "pairs told apart"]]
    for name, numbers in policies.items():
        trained = iterations.get(name, {})
        if not trained and not measured and iterations:
            # Nothing is known of it, but of others.
            continue
        cells = [_cell(numbers["accuracy"]), _cell(numbers["stderr"]), str(numbers["n"])] if measured else []
        gain = gains.get(name, {"mean": None, "stderr": None})
        cells += [cell(gain["mean"], gain["stderr"], 3, sign=True)] if compared else []
        apart = _cell(trained.get("classification_accuracy"))
        told = f"{apart} of {trained['held_out_pairs']}" if apart else ""
        rows.append([name, *cells, _cell(trained.get("reward_real")), _cell(trained.get("reward_generated")), told])
    return filled(rows)


def content(
    run: Run,
    evaluations: dict[str, dict[str, Any]],
    iterations: list[dict[str, Any]],
    final: str,
    stopped: str | None,
    warnings: list[str],
    demonstrations: dict[str, Any],
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        run: the run, with all stages done.
        evaluations: numbers of the evaluation stage by policy, in the order of the policies.
        iterations: `iteration_numbers` of every training on pairs.
        final: the policy that was chosen.
        stopped: why the job stopped before all its iterations.
        warnings: for a person.
        demonstrations: numbers of the stage that read the data.
    """
    return {
        "run": run.root.name,
        "policies": {name: {key: numbers[key] for key in ("accuracy", "stderr", "n")} for name, numbers in evaluations.items()},
        "gains": {name: numbers["gain"] for name, numbers in evaluations.items() if numbers.get("gain")},
        "iterations": iterations,
        "final": final,
        "stopped": stopped,
        "warnings": [*set_aside("demonstrations", demonstrations), *warnings],
        "demonstrations": demonstrations,
        "stages": run.log,
        "total_seconds": round(sum(stage["seconds"] for stage in run.log), 1),
    }


def write(run: Run, config: dict[str, Any], content: dict[str, Any], policy: Stage) -> dict[str, Any]:
    """Writes final/ with its model card, and summary.json; returns what is in it."""
    write_final(run, content["final"], policy, model_card(config, content))
    write_json(run.root / "summary.json", content)
    return content


def write_final(run: Run, name: str, policy: Stage, card: str) -> None:
    """Puts a policy with its model card at final/; the weights are hard links where the disk allows it."""
    final, building = run.root / "final", run.root / ".final.tmp"
    made = {"policy": name, "fingerprint": policy.fingerprint, "content": (run.manifest(policy) or {}).get("content")}
    if read_json(final / "policy.json") != made:
        run.require(policy)
    shutil.rmtree(building, ignore_errors=True)
    source = base_model.weights(run, policy)
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source)
    shutil.copytree(source, building, copy_function=_link)
    if (tokenizer := run.directory(policy) / "tokenizer").is_dir():
        # The base model itself, which has not the run's chat template and stop tokens yet.
        shutil.copytree(tokenizer, building, dirs_exist_ok=True)
    (building / "README.md").write_text(card, encoding="utf-8")
    write_json(building / "policy.json", made)
    shutil.rmtree(final, ignore_errors=True)
    building.replace(final)


def model_card(config: dict[str, Any], summary: dict[str, Any]) -> str:
    """README.md of final/: what it was made from, how, and what it scored."""
    results = ruled(table(summary["policies"], _by_policy(summary), summary["gains"]))
    software = "\n".join(f"- {package} {version}" for package, version in versions().items())
    sections = ("sft", "iterations", "objective", "training", "negatives")
    hyper = json.dumps({key: config[key] for key in sections if key in config}, indent=1)
    chosen, objective = summary["final"], config["objective"]
    warnings = "".join(f"\n- Warning: {text}" for text in summary["warnings"])
    base = config["model"]["path"]
    # The hub reads this field, and knows nothing but its own names.
    origin = f"base_model: {base}\n" if HUB_NAME.fullmatch(base) else ""
    system = config["demonstrations"]["system_prompt"]
    return f"""---
{origin}library_name: transformers
pipeline_tag: text-generation
tags: [imitation-learning, {objective["name"].partition("_")[0]}]
---
# {summary["run"]}: {chosen}

- Base model: `{config["model"]["path"]}`
- Demonstrations: `{config["demonstrations"]["path"]}`, {summary["demonstrations"]["train"]} for training, \
{summary["demonstrations"]["held_out"]} held out, {summary["demonstrations"]["rejected"]} rejected
- System prompt of every conversation without one of its own: {f"`{system}`" if system else "none"}
- This policy: {_made(chosen, config)}{warnings}

Load it with `AutoModelForCausalLM.from_pretrained`, or `vllm serve`; the chat template is the tokenizer's.

## Results on held-out prompts

{results}

## Hyper-parameters

```json
{hyper}
```

## Software

{software}
"""


def _made(policy: str, config: dict[str, Any]) -> str:
    objective = config["objective"]
    if policy == "sft":
        trained = config.get("sft", {}).get("epochs", 1)
        return "sft, by supervised fine-tuning alone" if trained else "sft, the base model as it is (sft.epochs=0)"
    return f"{policy}, by {objective['name']} with beta {objective['beta']} and gamma {objective['gamma']}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _link(source: str, target: str) -> str:
    # Small files are copied: people edit them, and a stage's own must stay what its manifest says.
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return target
    shutil.copy2(source, target)
    return target
