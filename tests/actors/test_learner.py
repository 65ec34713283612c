"""The learner under real DeepSpeed: any number of workers takes the same steps; the exported policy is the trained one."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import write_tiny
from safetensors import safe_open
from training import assert_same_steps, train, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner import policy
from actors.learner.batches import Example
from actors.learner.learner import Learner
from actors.learner.logprobs import ResponseLogProbs
from actors.learner.worker import learning_rate
from actors.scorer import Scorer
from actors.settings import Objective, Scoring, Training


@pytest.fixture(scope="module")
def pairs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose reference is the tiny model itself."""
    return write_pairs(tiny, tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def alone(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], Path]:
    """One worker, one micro-batch a step."""
    output = tmp_path_factory.mktemp("alone")
    return train(tiny, pairs, output, 1, Objective(beta=0.1), micro_batch_tokens=10000), output


def test_the_first_step_starts_at_the_reference(alone: tuple[list[dict[str, float]], Path]) -> None:
    first = alone[0][0]
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=1e-5)
    assert first["reward_real"] == pytest.approx(0, abs=1e-5) and first["reward_generated"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("precision", "world"), [("float32", 2), ("bfloat16", 2)])
def test_without_a_step_every_log_ratio_is_zero(precision: str, world: int, tiny: Path, tmp_path: Path) -> None:
    data = write_pairs(tiny, tmp_path / "pairs.parquet", precision=precision)
    train(tiny, data, tmp_path / "out", world, Objective(), precision=precision, learning_rate=1e-30, micro_batch_tokens=40)
    held_out = pq.read_table(tmp_path / "out/held_out.parquet")
    for side in ("rho_real", "rho_generated"):
        assert np.abs(held_out[side].to_numpy()).max() < (1e-4 if precision == "float32" else 5e-2)


def test_training_tells_real_from_generated(alone: tuple[list[dict[str, float]], Path]) -> None:
    steps = alone[0]
    assert len(steps) == 4 and steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["margin"] > 0.01
    logged = {"loss", "loss_real", "loss_generated", "reward_real", "reward_generated", "margin", "accuracy"}
    assert logged | {"logps_real", "logps_generated", "grad_norm", "learning_rate", "tokens_per_second"} <= set(steps[0])


@pytest.mark.parametrize(("world", "tokens", "zero"), [(1, 40, 1), (2, 40, 0), (2, 80, 2), (2, 1, 3)])
def test_workers_micro_batches_and_zero_stages_take_the_same_steps(
    world: int, tokens: int, zero: int, alone: tuple[list[dict[str, float]], Path], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    steps = train(tiny, pairs, tmp_path, world, Objective(beta=0.1), micro_batch_tokens=tokens, zero_stage=zero)
    assert_same_steps(steps, alone[0])
    held_out = [json.loads((path / "held_out.json").read_text()) for path in (tmp_path, alone[1])]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3, abs=1e-3)


def test_zero_3_gathers_the_head_once_however_many_chunks_a_worker_has(tiny: Path, tmp_path: Path) -> None:
    # 700 and 300 response tokens are two chunks and one; weights as small as these stay with every worker unless DeepSpeed is told.
    draw = np.random.default_rng(0)
    ids = {name: [draw.integers(6, 280, length).tolist() for length in (350, 150)] for name in ("real", "generated")}
    columns = {"id": ["a", "b"], "prompt_ids": [[0, 7, 8]] * 2} | {f"{name}_ids": rows for name, rows in ids.items()}
    data = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns | {"ref_logp_real": [0.0] * 2, "ref_logp_generated": [0.0] * 2}), data)
    options = {"batch_size": 2, "micro_batch_tokens": 1, "epochs": 3, "learning_rate": 1e-5}
    gathered = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}}
    alone = train(tiny, data, tmp_path / "alone", 1, Objective(beta=0.001), **options)
    both = train(tiny, data, tmp_path / "both", 2, Objective(beta=0.001), zero_stage=3, theirs=gathered, **options)
    assert_same_steps(both, alone)


def test_recomputed_activations_take_the_same_steps(
    alone: tuple[list[dict[str, float]], Path], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    steps = train(tiny, pairs, tmp_path, 1, Objective(beta=0.1), micro_batch_tokens=10000, gradient_checkpointing=True)
    assert_same_steps(steps, alone[0])


@pytest.mark.parametrize("how", ["auto", True, False])
def test_rows_beyond_the_budget_are_recomputed(how: Any, tiny: Path) -> None:
    settings = Training(micro_batch_tokens=50, gradient_checkpointing=how)
    learner = Learner.__new__(Learner)
    model = policy.trainable(policy.load(str(tiny), "float32", None, False), settings).train()
    learner.settings, learner.engine = settings, SimpleNamespace(module=SimpleNamespace(model=model))
    learner.layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing")]

    def kept() -> int:
        """Bytes that a forward pass keeps for the backward pass."""
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
            model(torch.arange(6, 56)[None], use_cache=False)
        return sum(saved)

    found = []
    for longest in (50, 51):
        learner._recompute(longest)
        found.append(kept())
    for layer in learner.layers:
        layer.gradient_checkpointing = False
    assert [size < 0.7 * kept() for size in found] == {"auto": [False, True], True: [True, True], False: [False, False]}[how]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_exported_policy_scores_as_the_trainer_did(precision: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    train(tiny, pairs, tmp_path, 2, Objective(beta=0.1), precision=precision, micro_batch_tokens=40, zero_stage=2)
    table = pq.read_table(pairs).to_pylist()
    # Whoever loads it and asks for nothing has the policy that was trained, not its master weights.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert {str(weight.dtype) for weight in loaded.state_dict().values()} == {f"torch.{precision}"}
    scorer = Scorer(str(tmp_path / "policy"), Scoring(), precision)
    logps = scorer([Example(r["id"], r["prompt_ids"], (r["real_ids"], r["generated_ids"])) for r in table])
    rho = [[a - r["ref_logp_real"], b - r["ref_logp_generated"]] for (a, b), r in zip(logps, table, strict=True)]
    trainer = [[row["rho_real"], row["rho_generated"]] for row in pq.read_table(tmp_path / "held_out.parquet").to_pylist()]
    assert np.abs(np.array(rho) - np.array(trainer)).max() < (1e-3 if precision == "float32" else 0.25)
    assert np.abs(np.array(trainer)).max() > 0.5, "the policy moved"


def test_the_exported_directory_is_a_plain_hugging_face_model(alone: tuple[list[dict[str, float]], Path], tiny: Path) -> None:
    policy = alone[1] / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.vocab_size == before.config.vocab_size and model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(policy).chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    assert (policy / "model.safetensors").exists() and (policy / "generation_config.json").exists()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{"precision": "bfloat16", "zero_stage": 1}, {"lora_r": 4, "lora_targets": "c_attn"}])
def test_tied_weights_are_once_on_disk(settings: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    train(write_tiny(tmp_path / "gpt2", "gpt2"), pairs, tmp_path / "out", 1, Objective(), **settings)
    with safe_open(tmp_path / "out/policy/model.safetensors", "pt") as weights:
        assert "transformer.wte.weight" in weights.keys() and "lm_head.weight" not in weights.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/policy")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_sft_raises_the_log_probs_of_demonstrations(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    rows = pq.read_table(pairs)
    demonstrations = tmp_path / "demonstrations.parquet"
    pq.write_table(pa.table({"id": rows["id"], "prompt_ids": rows["prompt_ids"], "response_ids": rows["real_ids"]}), demonstrations)
    steps = train(tiny, demonstrations, tmp_path / "out", 1, Objective(name="sft"), epochs=3)
    assert len(steps) == 6 and {"loss", "logps_real", "grad_norm"} <= set(steps[0])
    after = json.loads((tmp_path / "out" / "held_out.json").read_text())["logps_real"]
    assert after > np.mean(rows["ref_logp_real"].to_pylist()) + 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kto", {"world": 2, "zero_stage": 1, "micro_batch_tokens": 30}),
        ("dil_lsif", {"world": 2, "zero_stage": 3, "offload": True}),
        ("cpo", {"world": 2, "optimizer": "rmsprop", "offload": True}),
    ],
)
def test_every_kind_of_objective_optimizer_and_offload_takes_the_same_steps_on_two_workers(
    name: str, settings: dict[str, int], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    # RMSprop divides by the gradient's size: its first steps are large.
    common = {"learning_rate": 1e-4, "optimizer": settings.get("optimizer", "adamw")}
    alone = train(tiny, pairs, tmp_path / "alone", 1, Objective(name=name), micro_batch_tokens=10000, zero_stage=0, **common)
    assert_same_steps(train(tiny, pairs, tmp_path / "two", objective=Objective(name=name), **(settings | common)), alone)  # type: ignore[arg-type]
    assert alone[-1]["loss"] < alone[0]["loss"]


@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_ktos_baseline_is_the_mean_reward_of_mismatched_responses_or_nothing(
    shift: float, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z0 = max(0, mean of beta * rho) over the global batch (KTO, arXiv 2402.01306), by hand."""
    rows = [Example(str(k), [0, 10 + k, 11], ([20 + k, 21, 1],)) for k in range(4)]
    model = policy.load(str(tiny), "float32", None, False).eval()
    logps = Scorer(str(tiny), Scoring(), "float32")(rows)
    wanted = [shift * (k + 1) for k in range(4)]
    refs = [(value - rho,) for (value,), rho in zip(logps, wanted, strict=True)]
    examples = SimpleNamespace(mismatched=lambda k: replace(rows[k], ref_logps=refs[k]))
    learner = Learner.__new__(Learner)
    learner.engine, learner.pad_id, learner.share_prompt, learner.device = ResponseLogProbs(model), 1, True, torch.device("cpu")
    learner.objective = Objective(name="kto", beta=0.5)
    monkeypatch.setattr(learner, "_over_workers", lambda sums: sums)
    z0 = learner._baseline(examples, [np.array([0, 1, 2]), np.array([3])], 4)  # type: ignore[arg-type]
    assert z0.item() == pytest.approx(max(0.0, 0.5 * np.mean(wanted)), abs=1e-3)


@pytest.mark.parametrize(("zero", "precision"), [(1, "float32"), (3, "bfloat16")])
def test_low_rank_adapters_are_merged_and_kept(zero: int, precision: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = {"lora_r": 4, "lora_alpha": 8, "lora_targets": "q_proj, v_proj", "learning_rate": 2e-2}
    train(tiny, pairs, tmp_path, 2, Objective(), zero_stage=zero, precision=precision, checkpoint_every=2, **lora)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    before = AutoModelForCausalLM.from_pretrained(tiny, dtype=merged.dtype)
    changed = {name for (name, p), q in zip(before.named_parameters(), merged.parameters(), strict=True) if not torch.equal(p, q)}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"} and len(changed) == 4
    adapted = PeftModel.from_pretrained(before, str(tmp_path / "adapter"))
    ids = torch.arange(6, 30)[None]
    # Of bfloat16 the sums are rounded, too.
    apart = (adapted(ids).logits - merged(ids).logits).float().abs()
    assert apart.max() < (1e-3 if precision == "float32" else 0.5) and apart.mean() < (1e-4 if precision == "float32" else 0.05)


def test_targets_that_match_nothing_are_an_error_that_names_them(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wqkv"):
        train(tiny, pairs, tmp_path, 1, Objective(), lora_r=4, lora_targets="wqkv")


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: Any, want: list[float]) -> None:
    settings = Training(schedule=schedule, learning_rate=2.0, warmup_ratio=0.3)
    assert [learning_rate(settings, step, 6) / 2.0 for step in range(6)] == pytest.approx(want)
