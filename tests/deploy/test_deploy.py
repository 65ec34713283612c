"""What deploy/ and cluster.yaml say: clusters for `ray up`, images, the Slurm script, the table of sizes."""

import os
import re
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import ROOT

from deploy import sizing

DEPLOY = ROOT / "deploy"
CLOUDS = ("cluster.yaml", "deploy/clusters/gcp.yaml")
CLUSTERS = (*CLOUDS, "deploy/clusters/on-premises.yaml")
IMAGES = {"your-registry/gsil:cpu", "your-registry/gsil:gpu"}


def cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster(name)))


def test_ray_refuses_a_key_that_it_does_not_know() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(cluster("cluster.yaml") | {"idle_timeout": 10}))


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cluster_in_a_cloud_grows_from_its_head_alone(name: str) -> None:
    config = cluster(name)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and set(types) == {"head", "gpu", "cpu"}
    assert types["head"]["resources"] == {"CPU": 0} and config["idle_timeout_minutes"] > 0
    for kind in ("gpu", "cpu"):
        assert types[kind]["min_workers"] == 0 < types[kind]["max_workers"]
    assert config["max_workers"] == types["gpu"]["max_workers"] + types["cpu"]["max_workers"]
    spot = {"aws": lambda node: node["InstanceMarketOptions"]["MarketType"], "gcp": lambda node: node["scheduling"]["provisioningModel"]}
    assert all(spot[config["provider"]["type"]](types[kind]["node_config"]).lower() == "spot" for kind in ("gpu", "cpu"))
    assert "InstanceMarketOptions" not in types["head"]["node_config"] and "scheduling" not in types["head"]["node_config"]


def test_machines_of_ones_own_all_join_at_once() -> None:
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(cluster("deploy/clusters/on-premises.yaml"))
    (kind,) = config["available_node_types"].values()
    # Nobody knows before what they have: the autoscaler starts none for a job.
    assert kind["resources"] == {} and kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"]) == 2


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_runs_the_image_on_the_shared_file_system(name: str) -> None:
    config = cluster(name)
    docker = config["docker"]
    assert docker["image"].endswith(":gpu") and docker["head_image"].endswith(":cpu")
    others = [kind["docker"]["worker_image"] for kind in config.get("available_node_types", {}).values() if "docker" in kind]
    assert {docker["image"], docker["head_image"], *others} == IMAGES
    assert "--volume /shared:/shared" in docker["run_options"]
    (mount,) = [command for command in config["initialization_commands"] if "mountpoint -q /shared" in command]
    # What one node wrote the others see.
    assert name not in CLOUDS or "lookupcache=positive" in mount
    assert not any("apt-get" in command.replace("apt-get -o DPkg::Lock::Timeout=300 ", "") for command in config["initialization_commands"])
    # A comment would hide the bracket that Ray puts behind a command.
    assert not any("#" in command for command in config["initialization_commands"])
    # Whoever reaches a dashboard starts jobs.
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


def sent(name: str) -> bool:
    """Whether Docker sends a file to a build: the last rule that fits a path or a folder above it decides."""
    decision = True
    above = [name, *map(str, Path(name).parents)][:-1]
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = rule.lstrip("!")
        if not rule or rule.startswith("#"):
            continue
        deep = pattern.removeprefix("**/")
        parts = Path(name).parts
        if any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for path in above) or (
            deep != pattern and any(fnmatch(part, deep) for part in parts)
        ):
            decision = rule.startswith("!")
    return decision


def test_an_image_gets_the_packages_and_nothing_private() -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements/gpu.txt", "actors/settings.py", "jobs/configs/quickstart.yaml"):
        assert (ROOT / name).is_file() and sent(name), name
    for name in (".git/config", ".venv/bin/python", "runs/a/final/config.json", ".env", "jobs/.env.local", "key.pem", "tests/conftest.py"):
        assert not sent(name), name
    assert not sent("actors/__pycache__/settings.pyc") and not sent("data/rows.jsonl")


def test_the_images_are_the_locks_and_not_root() -> None:
    lines = (DEPLOY / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    text = [line for line in lines if line and not line.startswith("#")]
    for device in ("cpu", "gpu"):
        start = text.index(f"FROM base AS {device}")
        # The lock comes before the code: an edit of the code installs nothing anew.
        assert text[start + 1] == f"COPY requirements/{device}.txt /tmp/lock.txt"
        assert text[start + 2].count("--no-deps") == 2 and (ROOT / f"requirements/{device}.txt").is_file()
    last = text[text.index("FROM ${DEVICE}") :]
    assert "COPY . ." in last and "USER 1000:1000" in last and not any(line.startswith("USER") for line in text[: -len(last)])
    assert last[-2].startswith("ENTRYPOINT [") and last[-1].startswith("CMD [") and "HOME=/home/gsil" in " ".join(last)
    # What DeepSpeed's build looks at is the same in the Makefile.
    (pattern,) = re.findall(r'FIRST="([^"]+)"', "\n".join(text))
    assert pattern in (ROOT / "Makefile").read_text().replace("$$", "$")


def test_an_installed_project_has_all_of_its_packages() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = [path.parent for room in ("actors", "pipelines", "jobs") for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(".".join(path.relative_to(ROOT).parts) for path in rooms) == sorted(listed["packages"])
    data = listed["package-data"].items()
    shipped = {path for package, patterns in data for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    kinds = (".html", ".txt")
    assert shipped == {path for room in ("actors", "pipelines", "jobs") for path in (ROOT / room).rglob("*") if path.suffix in kinds}


SLURM = """#!/bin/sh
# A command that writes down how it was called, once it would hear a signal, and waits for those before it.
called="$(basename "$0") $*"
started() { test "$(grep -c "start --block" "$LOG")" -ge "$1" || { sleep 0.05; started "$1"; }; }
case "$called" in
  "srun "*"start --block"*) trap 'echo ended >> "$LOG"; exit 0' TERM ;;
  "python "*) trap 'echo "job interrupted" >> "$LOG"; exit 130' TERM; started 2 ;;
  "ray "*) started 1 ;;
esac
echo "$called" >> "$LOG"
case "$called" in
  "scontrol show"*) printf 'node-a\\nnode-b\\n' ;;
  "srun "*hostname*--ip-address) echo 10.0.0.7 ;;
  "srun "*"start --block"*) while :; do sleep 0.05; done ;;
  "python "*) while ! test -e "$LOG.go"; do sleep 0.05; done; exit "$(cat "$LOG.go")" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job on two nodes, with commands that write down how they were called."""
    for name in ("bin/srun", "bin/scontrol", "project/.venv/bin/ray", "project/.venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SLURM)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_SUBMIT_DIR": str(tmp_path / "project")}
    sizes = {"SLURM_CPUS_PER_TASK": "96", "SLURM_GPUS_ON_NODE": "8", "LOG": str(tmp_path / "log")}
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | job | sizes


def submitted(environment: dict[str, str], *argv: str) -> subprocess.Popen[str]:
    """Started, and so far that its job runs."""
    script = subprocess.Popen([DEPLOY / "slurm.sh", *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while not (Path(environment["LOG"]).is_file() and "python " in Path(environment["LOG"]).read_text()):
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)
    return script


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_starts_ray_everywhere_and_ends_it_with_the_job(slurm: dict[str, str], status: int) -> None:
    script = submitted(slurm, "jobs/dil.py", "--run.name", "a b")
    Path(slurm["LOG"] + ".go").write_text(str(status))
    output = script.communicate(timeout=30)[0]
    assert script.returncode == status, output
    log = Path(slurm["LOG"]).read_text().splitlines()
    head, workers = (line for line in log if "start --block" in line)
    for words in ("--nodelist=node-a", "--head", "--port=24711", "--node-ip-address=10.0.0.7", "--num-cpus=96", "--num-gpus=8"):
        assert words in head.split()
    assert {"--nodes=1", "--ntasks=1", "--exclude=node-a", "--address=10.0.0.7:24711", "--num-gpus=8"} <= set(workers.split())
    assert "python jobs/dil.py --run.name a b --ray.address 10.0.0.7:24711" in log
    assert log.index(next(line for line in log if line.startswith("ray health-check"))) < log.index(workers)
    assert log.count("ended") == 2 and not any("requeue" in line for line in log)
    assert log[-1].endswith("rm -rf /tmp/ray-4711")


@pytest.mark.parametrize(("sent_to_it", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_interrupts_the_job_and_only_a_time_limit_queues_it_again(slurm: dict[str, str], sent_to_it: int, again: bool) -> None:
    script = submitted(slurm, "jobs/dil.py")
    script.send_signal(sent_to_it)
    output = script.communicate(timeout=30)[0]
    assert script.returncode == 130, output
    log = Path(slurm["LOG"]).read_text().splitlines()
    assert "job interrupted" in log and log.count("ended") == 2
    # Not before everything has ended: Slurm kills what is left of a job that it puts back.
    assert (log[-1] == "scontrol requeue 4711") == again


def test_slurm_says_how_it_is_used(slurm: dict[str, str]) -> None:
    done = subprocess.run([DEPLOY / "slurm.sh"], env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_training_bytes_of_a_model_by_hand() -> None:
    model = sizing.Model(1e9, layers=2, width=10, kv_width=5)
    # ZeRO 1 on 4 GPUs: bfloat16 weights 2, float32 gradients 4, a quarter of master weights and two moments 12.
    assert model.state_bytes(1, 4) == 1e9 * (2 + 4 + 3)
    assert model.state_bytes(2, 4) == 1e9 * (2 + 14 / 4)
    assert model.state_bytes(3, 4) == 1e9 * 16 / 4
    assert model.kv_bytes() == 2 * 2 * 2 * 5
    assert model.activation_bytes() == 8192 * 10 * (2 * 2 + 34)


def test_hours_of_the_run_by_hand() -> None:
    found = sizing.size(sizing.Model(1e9, 16, 2048, 512), sizing.Gpu(80e9, 1e15, 1e12), gpus=10)
    tokens = 133 + 291 + 169
    # 62,000 pairs, three times, 8 FLOPs a token and weight at 35 % of 10 x 1e15 a second.
    assert found.training == pytest.approx(3 * 62_000 * tokens * 8e9 / (0.35 * 10 * 1e15) / 3600)
    assert found.scoring == pytest.approx(3 * 62_512 * tokens * 2e9 / (0.35 * 10 * 1e15) / 3600)
    # 256 sequences a step, which reads 2 GB of weights and of each 217.5 tokens of 32,768 bytes at 0.4 TB/s, and 5 ms.
    decoded = 256 / ((2e9 + 256 * 217.5 * 2 * 2 * 16 * 512) / 0.4e12 + 0.005)
    assert found.decoded == pytest.approx(decoded) and found.tensor_parallel == 1 and found.scoring_fits and found.zero_stage == 1
    samples = 3 * 62_512 + 5 * 2_000
    assert found.generation == pytest.approx((samples * 169 / (10 * decoded) + samples * 133 * 2e9 / (0.35 * 10 * 1e15)) / 3600)


def test_a_model_that_fits_nowhere_is_told() -> None:
    row = sizing.row("70B", "A100", 8)
    assert row[2] == "**none fits**" and row[7].startswith("**does not fit**") and int(row[5]) == 4


def test_the_readme_has_the_table_that_the_script_prints() -> None:
    printed = subprocess.run([sys.executable, DEPLOY / "sizing.py"], capture_output=True, text=True, check=True, cwd="/").stdout
    assert printed.strip() in (DEPLOY / "README.md").read_text()
    # Every assumption is named there with its value.
    for value in (f"{sizing.MFU:.0%}", f"{sizing.DECODING:.0%}", f"{sizing.STEP_SECONDS * 1000:g} ms", f"{sizing.MICRO_BATCH_TOKENS:,}"):
        assert value.replace("%", " %") in (DEPLOY / "README.md").read_text(), value
