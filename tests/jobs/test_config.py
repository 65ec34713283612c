"""Config: YAML and overrides, nearest names, cross-field checks, quick and light start."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.learner.deepspeed_config import deepspeed_config, read_deepspeed
from actors.settings import Engine, Settings, Training
from jobs import runner
from jobs.config import ConfigError, build, help_text, to_yaml
from jobs.gsil_iterative import align, plan
from jobs.schemas import DilConfig, EvaluateConfig, GsilConfig, IrlConfig, JobConfig, ReproduceConfig, ServeConfig
from pipelines.settings import RunSettings

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("schema", [GsilConfig, IrlConfig, ReproduceConfig])
def test_a_section_that_is_given_in_part_keeps_the_jobs_defaults(schema: type[JobConfig]) -> None:
    default = schema()
    for name, section in default:
        key, value = next(iter(section))
        assert getattr(schema.model_validate({name: {key: value}}), name) == section


@pytest.mark.parametrize(
    ("schema", "key", "value", "said"),
    [
        (EvaluateConfig, "judge.backend", "transformers", "judge.backend='transformers': input should be 'vllm'"),
        (ServeConfig, "judge.backend", "transformers", "judge.backend='transformers': input should be 'vllm'"),
        (EvaluateConfig, "prompts.held_out_path", "a.jsonl", "prompts.held_out_path: 'a.jsonl' is not used here, as all rows are prompts"),
        (EvaluateConfig, "prompts.held_out_limit", "4", "prompts.held_out_limit: 4 is not used here"),
        (EvaluateConfig, "prompts.held_out_fraction", "0.1", "prompts.held_out_fraction: 0.1 is not used here"),
        (DilConfig, "evaluation.pairs", "9", "there is no 'evaluation.pairs'"),
    ],
)
def test_a_key_that_a_job_does_not_use_is_refused(schema: type[Settings], key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(schema, [f"--{key}", value])
    assert said in str(error.value)
    assert "--prompts.held_out_path  null, default null\n      not used here" in help_text(EvaluateConfig, "")


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        build(GsilConfig, argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft:\n  epochs: 1\n  workers: 2\n  epochs: 3\n", "a.yaml:4: not valid YAML: the key 'epochs' stands twice in its section"),
        ("sft:\n  epochs: [1\nrun: x\n", "a.yaml:3: not valid YAML"),
        ("model.path: x\n", "a.yaml: 'model.path' has a dot, as on the command line: in a file write `model:` and below it `path:`"),
        ("foo.bar: x\n", "a.yaml: there is no 'foo.bar'; --help lists all keys"),
    ],
)
def test_files_that_are_no_config(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    message = refused("--config", str(tmp_path / "a.yaml"))
    assert said in message and "\n" not in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    schemas: dict[str, type[Settings]] = {"dil": DilConfig, "irl": IrlConfig, "serve": ServeConfig, "reproduce": ReproduceConfig}
    schema = schemas.get(path.stem.partition("_")[0], GsilConfig)
    config = build(schema, ["--config", str(path)])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert build(schema, ["--config", str(tmp_path / "again.yaml")]) == config


def test_overrides_win_over_files_and_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {learning_rate: 1.0e-4, epochs: 3}\n")
    config = build(GsilConfig, ["--training.learning_rate", "5e-7", "--config", str(tmp_path / "a.yaml"), "--iterations.count=5"])
    assert (config.training.learning_rate, config.training.epochs, config.iterations.count) == (5e-7, 3, 5)
    assert build(GsilConfig, ["--run.name", "2026-05-01"]).run.name == "2026-05-01", "text stays text"
    prompted = ["--demonstrations.system_prompt", "# Rules: [x]"]
    config = build(GsilConfig, ["--ray.address", "null", "--tracking.wandb_project", "2026", *prompted])
    assert (config.ray.address, config.tracking.wandb_project, config.demonstrations.system_prompt) == (None, "2026", "# Rules: [x]")
    assert build(EvaluateConfig, ["--policies.run", "2026-01-05", "--tasks.names", "[mbpp]"]).policies.run == "2026-01-05"


def test_policies_are_sampled_in_the_precision_that_they_are_trained_in() -> None:
    assert build(GsilConfig, []).sampler().dtype == build(DilConfig, ["--demonstrations.path", "a.jsonl"]).sampler().dtype == "float32"
    config = build(GsilConfig, ["--training.precision", "bfloat16", "--engine.num_cpus", "2"])
    assert config.sampler() == Engine(num_cpus=2, dtype="bfloat16") and config.engine.dtype == "auto", "another precision asks anew"
    assert build(GsilConfig, ["--sft.precision", "bfloat16", "--iterations.count", "0"]).sampler().dtype == "bfloat16"
    assert build(IrlConfig, ["--sft.precision", "bfloat16"]).sampler().dtype == "bfloat16", "the policy is the SFT stage's"
    assert build(IrlConfig, ["--training.precision", "bfloat16"]).sampler().dtype == "float32"
    assert build(GsilConfig, ["--training.precision", "bfloat16", "--engine.dtype", "float16"]).sampler().dtype == "float16"


@pytest.mark.parametrize(
    ("schema", "argv"),
    [
        (GsilConfig, []),
        (DilConfig, ["--evaluation.metric", "exact_answer"]),
        (IrlConfig, []),
    ],
)
def test_who_needs_held_out_prompts_says_so(schema: type[JobConfig], argv: list[str]) -> None:
    nothing = ["--demonstrations.path", "a.jsonl", "--demonstrations.held_out_fraction", "0"]
    with pytest.raises(ConfigError, match=r"held_out_fraction=0 holds nothing out, but .* held-out prompts: raise"):
        build(schema, [*nothing, *argv])
    assert build(schema, [*nothing, *argv, "--demonstrations.held_out_path", "b.jsonl"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--training.learning_rat", "1"], ["'training.learning_rat'", "'training.learning_rate'"]),
        (["--trainin.epochs", "1"], ["'trainin'", "'training'"]),
        (["--learning_rate", "1"], ["there is no 'learning_rate'; did you mean 'sft.learning_rate'?"]),
        (["--best_of_n.n", "1"], ["there is no 'best_of_n'; it is a section of jobs/irl_reward.py"]),
        (["--training.frobnicate", "1"], ["there is no 'training.frobnicate'; --help lists all keys"]),
        (["--objective.name", "foo"], ["objective.name='foo': input should be 'gsil_logistic', "]),
        (["--objective.name", "logistik"], ["objective.name", "logistik", "logistic"]),
        (["--objective.beta", "0"], ["objective.beta", "greater than 0"]),
        (["--training.batch_size", "7", "--training.workers", "2"], ["batch_size=7", "workers=2"]),
        (["--negatives.greedy", "true", "--negatives.samples", "2"], ["greedy", "samples=2"]),
        (["--evaluation.metric", "none"], ["stop_when_worse", "evaluation.metric"]),
        (["--training.precision", "bfloat16", "--training.zero_stage", "0"], ["zero_stage=0", "bfloat16"]),
        (["--demonstrations.max_prompt_tokens", "1024"], ["max_prompt_tokens=1024", "max_tokens=1024"]),
        (["--engine.tensor_parallel", "2"], ["tensor_parallel=2", "num_gpus=2"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "No such file"]),
        (["training.epochs", "1"], ["'training.epochs'", "--section.key"]),
        (["--training.epochs"], ["needs a value"]),
        (["--training", "1"], ["'training' is a section"]),
        (["--objective.name", "sft", "--objective.sft_weight", "0"], ["sft_weight=0 leaves nothing to minimise"]),
        (["--run.root", "s3://bucket/runs"], ["s3://bucket/runs", "every node mounts"]),
        (["--objective.name", "spin", "--objective.gamma", "1"], ["gamma=1.0 means nothing to spin", "gsil_logistic"]),
        (["--objective.delta", "2"], ["delta=2.0 means nothing to gsil_logistic: only to slic"]),
        (["--objective.beta", "inf"], ["objective.beta", "finite"]),
        (["--demonstrations.columns", "{promt: q}"], ["'promt'", "prompt, completion"]),
        (["--objective.name", "gsil_logistik"], ["did you mean 'gsil_logistic'?"]),
        (["--training.epochs", "many"], ["training.epochs", "many"]),
        (["--sft.epochs", "0", "--iterations.count", "0"], ["train nothing", "raise one"]),
        (
            ["--demonstrations.path", "a.jsonl", "--demonstrations.held_out_fraction", "0"],
            ["held_out_fraction=0 holds nothing out", "raise"],
        ),
        (["--model.path", ""], ["model.path=''", "at least 1 character"]),
        (["--run.name", "a/b"], ["name='a/b' names a folder: letters, digits"]),
        (["--workers", "2"], ["there is no 'workers'; did you mean 'sft.workers'?"]),
        (["--rewards.seeds", "2"], ["there is no 'rewards'", "a section of jobs/irl_reward.py, jobs/reproduce.py"]),
    ],
)
def test_mistakes_are_named(argv: list[str], words: list[str]) -> None:
    message = refused(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "why", "meant"),
    [
        (r'["regex:is (\d+)"]', "YAML cannot read it (found unknown escape character 'd'): ", r"['regex:is (\d+)']"),
        ("[regex:[a-z]+]", "YAML cannot read it (expected ',' or ']', but got '<scalar>'): ", "['regex:[a-z]+']"),
        ("regex:[a-z]+", "", "['regex:[a-z]+']"),
        (r'regex:say "(\w+)"', "", r"""['regex:say "(\w+)"']"""),
    ],
)
def test_a_list_that_yaml_cannot_read_is_written_as_it_can(text: str, why: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(EvaluateConfig, ["--answers.measures", text])
    told, _, suggestion = str(error.value).partition("a list is wanted, such as ")
    assert told == f"answers.measures='{text}': {why}" and shlex.split(suggestion) == [meant]
    assert build(EvaluateConfig, ["--answers.measures", meant]).answers.measures == [meant[2:-2]]


def test_a_mapping_that_yaml_cannot_read_is_written_as_it_can() -> None:
    for text, meant in ((r'{a: "C:\models"}', r'''"{a: 'C:\models'}"'''), ("{a: b: c}", "'{NAME: VALUE}'"), ("a", "'{NAME: VALUE}'")):
        with pytest.raises(ConfigError) as error:
            build(EvaluateConfig, ["--policies.paths", text])
        assert str(error.value).endswith(f"a mapping is wanted, such as {meant}"), error.value
        assert ("YAML cannot read it" in str(error.value)) == (text != "a")


@pytest.mark.parametrize("schema", [GsilConfig, DilConfig, IrlConfig, EvaluateConfig, ReproduceConfig, ServeConfig])
def test_help_names_every_key_with_its_meaning(schema: type[Settings]) -> None:
    text = help_text(schema, "usage")
    words = " ".join(text.split())
    for section, field in schema.model_fields.items():
        for key, option in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"--{section}.{key}  " in text
            assert option.description, f"{section}.{key} has no description"
            assert " ".join(option.description.split()) in words
    assert "--ray.num_cpus  int | null, default null" in text


@pytest.mark.parametrize("columns", [80, 140])
def test_help_fits_the_terminal_and_keeps_its_indentation(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for schema in (EvaluateConfig, IrlConfig):
        lines = help_text(schema, "usage").splitlines()
        assert max(map(len, lines)) <= columns
        begins = ("usage", "Options:", "Keys (", *(f"{section}: " for section in schema.model_fields))
        assert all(line.startswith(("  --", "      ", *begins)) for line in lines if line)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys; sys.argv = ['job', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('jobs/gsil_iterative.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'ray', 'torch', 'vllm', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1.5


def test_a_submitted_jobs_runs_are_not_thrown_away_with_its_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert RunSettings(name="a").directory() == tmp_path / "runs/a"
    (tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1")
    assert RunSettings(name="a").directory() == tmp_path / "home/runs/a"
    assert RunSettings(name="a", root="/shared/runs").directory() == Path("/shared/runs/a")


def test_a_users_deepspeed_json_is_laid_over_ours(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true}, "train_batch_size": "auto", "wall_clock_breakdown": true}')
    merged = deepspeed_config(Training(deepspeed=str(path)), 1, read_deepspeed(str(path)))
    assert merged["zero_optimization"]["stage"] == 1 and merged["zero_optimization"]["overlap_comm"] is True
    assert merged["train_batch_size"] == 1 and merged["wall_clock_breakdown"] is True
    path.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": "auto", "buffer_count": 8}}}')
    merged = deepspeed_config(Training(deepspeed=str(path), offload=True), 1, read_deepspeed(str(path)))
    assert merged["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "buffer_count": 8}


@pytest.mark.parametrize(
    "said",
    [
        '{"fp16": {"enabled": false}, "bfloat16": {"enabled": false}, "amp": {"enabled": false}}',
        '{"fp16": {"enabled": "auto", "loss_scale": 0}, "optimizer": {"type": "AdamW", "params": null}}',
        '{"zero_optimization": {"cpu_offload": false, "cpu_offload_param": null, "offload_optimizer": null}}',
        '{"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}}',
        '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0}}}',
        '{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}, "gradient_clipping": 1.0}',
        '{"gradient_allreduce_op": "mean"}',
    ],
)
def test_a_deepspeed_json_that_agrees_is_no_contradiction(said: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(said)
    assert deepspeed_config(Training(deepspeed=str(path)), 1, read_deepspeed(str(path))) == deepspeed_config(Training(), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"fp16": {"enabled": true}}', ["fp16=", "precision=float32"]),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', ["offload_optimizer=", "offload=False"]),
        ('{"zero_optimization": {"stage": 3}}', ["zero_optimization.stage=3", "zero_stage=1"]),
        ('{"gradient_allreduce_op": "sum"}', ["gradient_allreduce_op='sum'", "batch_size=8"]),
        ('{"train_batch_size": 64}', ["train_batch_size=64", " batch_size=8"]),
        ('{"bf16": {"enabled": true}}', ["bf16.enabled=True", "precision=float32"]),
        ('{"bfloat16": {"enabled": true}}', ["bfloat16=", "precision=float32"]),
        ('{"torch_autocast": {"enabled": true, "dtype": "bf16"}}', ["torch_autocast=", "precision=float32"]),
        ('{"zero_optimization": {"cpu_offload": true}}', ["cpu_offload=True", "offload=False"]),
        ('{"zero_optimization": false}', ["zero_optimization=False", "object", '"stage": 1']),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}', ["optimizer=", "2e-05", "learning_rate=1e-05"]),
        ('{"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}', ["optimizer=", "betas", "optimizer=adamw"]),
        ('{"optimizer": {"type": "Adam"}}', ["optimizer=", "Adam", "optimizer=adamw", "learning_rate=1e-05"]),
        ("[1]", ["JSON object"]),
        ("{", ["ds.json"]),
    ],
)
def test_a_contradiction_with_deepspeed_json_names_both_values(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        deepspeed_config(Training(deepspeed=str(path)), 1, read_deepspeed(str(path)))
    assert all(word in str(error.value) for word in words), error.value


def test_all_contradictions_of_a_deepspeed_json_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "fp16": {"enabled": true}}')
    with pytest.raises(ValueError, match=r"train_batch_size=64.*stage=2.*bf16.enabled=True.*fp16="):
        deepspeed_config(Training(deepspeed=str(path)), 1, read_deepspeed(str(path)))


def test_a_section_whose_keys_are_commented_out_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("run:\n  name: mine\nsft:\n  # epochs: 3\n")
    (tmp_path / "all.yaml").write_text("# nothing yet\n")
    config = build(GsilConfig, ["--config", str(tmp_path / "some.yaml"), "--config", str(tmp_path / "all.yaml")])
    assert config.run.name == "mine" and config.sft == GsilConfig().sft


# METHODS: the paper's published run and its released script.
def test_the_published_run_is_as_published() -> None:
    config = build(GsilConfig, ["--config", str(ROOT / "jobs/configs/zephyr_7b_ultrafeedback.yaml")])
    assert config.model.path == "alignment-handbook/zephyr-7b-sft-full" and config.sft.epochs == 0
    assert config.demonstrations.path == "HuggingFaceH4/ultrafeedback_binarized" and config.demonstrations.layout == "preference"
    assert (config.demonstrations.max_prompt_tokens, config.demonstrations.max_tokens) == (512, 1024)
    assert (config.objective.name, config.objective.beta, config.objective.gamma) == ("gsil_logistic", 0.01, 2.0)
    steps = config.training
    assert (steps.learning_rate, steps.optimizer, steps.schedule, steps.warmup_ratio) == (5e-7, "rmsprop", "linear", 0.1)
    assert (steps.epochs, steps.batch_size, steps.precision) == (1, 128, "bfloat16")
    assert config.negatives.greedy and config.negatives.max_new_tokens == 256


def test_a_job_hides_no_library_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Python begins with `python jobs/evaluate.py`: lm-eval imports a library called evaluate.
    monkeypatch.setattr(sys, "path", [str(ROOT / "jobs"), *sys.path])
    with pytest.raises(SystemExit):
        runner.main(GsilConfig, ["--help"], "", plan, align)
    assert str(ROOT / "jobs") not in sys.path and str(ROOT) in [str(Path(path).resolve()) for path in sys.path]


@pytest.mark.parametrize("schema", [GsilConfig, DilConfig, IrlConfig, EvaluateConfig, ReproduceConfig])
def test_a_jobs_config_names_its_script(schema: type[JobConfig]) -> None:
    assert f"runner.main({schema.__name__}, " in (ROOT / schema.script).read_text()
