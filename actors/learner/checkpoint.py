"""Checkpoints of the training state: DeepSpeed's own shards, one directory a checkpoint, complete when its `done.json` is there.

    checkpoints/step-000200/   weights, optimizer state, one file a worker
                done.json      step, workers, ZeRO stage, architecture; written last

With another number of workers or another ZeRO stage (elastic training, or a run that continues elsewhere) they are converted with
DeepSpeed's universal checkpointing first.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from actors.settings import Training


class Checkpoints:
    """The checkpoints of a training stage.

    Args:
        directory: theirs.
        settings: of the stage.
        architecture: what a checkpoint's model must be to be of use: names and sizes.
    """

    def __init__(self, directory: Path, settings: Training, architecture: dict[str, Any]):
        self.directory, self.settings, self.architecture = directory, settings, architecture
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def newest(self) -> dict[str, Any] | None:
        """`done.json` of the newest complete checkpoint that this stage can go on from, or None.

        Raises:
            ValueError: the checkpoint is of another architecture, or of a ZeRO stage that it cannot be converted from.
        """
        complete = sorted(self.directory.glob("step-*/done.json"))
        if not complete:
            return None
        found = json.loads(complete[-1].read_text(encoding="utf-8"))
        if found["architecture"] != self.architecture:
            raise ValueError(
                f"{complete[-1].parent} is a checkpoint of {found['architecture']}, the policy is {self.architecture}: remove it"
            )
        if found["zero_stage"] != self.settings.zero_stage and 0 in (found["zero_stage"], self.settings.zero_stage):
            raise ValueError(
                f"{complete[-1].parent} was written with zero_stage={found['zero_stage']} and cannot go on with "
                f"{self.settings.zero_stage}: set it back, or remove the checkpoint to begin anew"
            )
        return found | {"path": str(complete[-1].parent)}

    def convert(self, found: dict[str, Any]) -> bool:
        """Readies a checkpoint of another number of workers or ZeRO stage; returns whether it had to. A collective."""
        same = found["world"] == self.world and found["zero_stage"] == self.settings.zero_stage
        if same or self.settings.zero_stage == 0:
            return False
        source, target = Path(found["path"]), self._universal(found)
        if self.rank == 0:
            from deepspeed.checkpoint.ds_to_universal import main

            shutil.rmtree(target, ignore_errors=True)
            options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
            main(argparse.Namespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options))
        dist.barrier()
        return True

    def restore(self, engine: Any, found: dict[str, Any], universal: bool) -> int:
        """Loads a checkpoint into the engine; returns the steps that it has behind it. A collective."""
        path = self._universal(found) if universal else Path(found["path"])
        strict = not self.settings.lora_r
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=strict, load_lr_scheduler_states=False)
        if loaded is None:
            raise RuntimeError(f"{path} could not be read")
        return int(found["step"])

    def save(self, engine: Any, step: int) -> None:
        """Writes a checkpoint after `step` steps and removes the oldest. A collective."""
        path = self.directory / f"step-{step:06d}"
        if (path / "done.json").exists():
            return
        engine.save_checkpoint(str(self.directory), tag=path.name, save_latest=False, exclude_frozen_parameters=bool(self.settings.lora_r))
        dist.barrier()
        if self.rank == 0:
            done = {"step": step, "world": self.world, "zero_stage": self.settings.zero_stage, "architecture": self.architecture}
            temporary = path / ".done.json"
            temporary.write_text(json.dumps(done), encoding="utf-8")
            temporary.replace(path / "done.json")
            complete = sorted(self.directory.glob("step-*/done.json"))
            keep = {file.parent for file in complete[-self.settings.checkpoints_kept :]}
            for other in {path for path in self.directory.iterdir() if path.is_dir()} - keep:
                shutil.rmtree(other, ignore_errors=True)
        dist.barrier()

    def _universal(self, found: dict[str, Any]) -> Path:
        return self.directory / f"universal-{Path(found['path']).name}"
