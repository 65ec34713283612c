"""Checkpoints of the training state: DeepSpeed's own shards, one directory a checkpoint, complete when its `done.json` is there.

    checkpoints/step-000200/   weights, optimizer state, one file a worker
                done.json      step, workers, ZeRO stage, architecture, sizes and checksums of the files; written last

With another number of workers or another ZeRO stage (elastic training, or a run that continues elsewhere) they are converted with
DeepSpeed's universal checkpointing first.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from actors.notices import tell
from actors.settings import Training
from actors.storage import checksums, damage, replacing

T = TypeVar("T")
WRITER = re.compile(r"pp_rank_(\d+)_")
"""In the name of a file that every worker writes for itself."""


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
        found = None
        complete = self._firsts(lambda: sorted(self.directory.glob("step-*/done.json")))
        while complete and found is None:
            found = self._intact(complete[-1])
            complete = complete if found else complete[:-1]
        if found is None:
            return None
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
        if self._firsts(lambda: (path / "done.json").exists()):
            return
        engine.save_checkpoint(str(self.directory), tag=path.name, save_latest=False, exclude_frozen_parameters=bool(self.settings.lora_r))
        dist.barrier()
        sums = self._together(checksums(path, self._mine(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())))
        if self.rank == 0:
            done = {"step": step, "world": self.world, "zero_stage": self.settings.zero_stage, "architecture": self.architecture}
            sizes = {name: (path / name).stat().st_size for name in sums}
            with replacing(path / "done.json") as temporary:
                temporary.write_text(json.dumps(done | {"files": sizes, "checksums": sums}), encoding="utf-8")
            complete = sorted(self.directory.glob("step-*/done.json"))
            keep = {file.parent for file in complete[-self.settings.checkpoints_kept :]}
            for other in {path for path in self.directory.iterdir() if path.is_dir()} - keep:
                shutil.rmtree(other, ignore_errors=True)
        dist.barrier()

    def _intact(self, path: Path) -> dict[str, Any] | None:
        """What a `done.json` says of a checkpoint that is what was written; a damaged one is removed. A collective: every worker looks at
        what it would read."""
        why: dict[str, str | None] = {}
        done, text = None, self._firsts(path.read_bytes)
        try:
            done = json.loads(text)
            # What the first worker finds gone is gone; where another one's node does not see its files yet, the attempt fails.
            sums, sizes = done.get("checksums", {}), done.get("files", {}) if self.rank == 0 else {}
            why = {str(self.rank): damage(path.parent, sizes, {name: sums[name] for name in self._mine(sums)})}
        except (ValueError, KeyError, AttributeError):
            why = {str(self.rank): "done.json is damaged"}
        found = next(filter(None, self._together(why).values()), None)
        if found is None:
            return done
        if self.rank == 0:
            tell(f"checkpoint {path.parent}: {found}: it is passed over")
            # Step by step the same name will be written again.
            shutil.rmtree(path.parent)
        dist.barrier()
        return None

    def _firsts(self, look: Callable[[], T]) -> T:
        """What the first worker finds: files reach the others' nodes later, and all have to do the same. A collective."""
        found: list[Any] = [look() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _mine(self, names: Iterable[str]) -> list[str]:
        """Those of a checkpoint's files that this worker reads for all: its own, which its node may still have in memory."""
        return [name for name in names if int(found[1] if (found := WRITER.search(name)) else 0) % self.world == self.rank]

    def _together(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What every worker knows, by name."""
        parts: list[Mapping[str, Any]] = [{}] * self.world
        dist.all_gather_object(parts, own)
        return {name: value for part in parts for name, value in part.items()}

    def _universal(self, found: dict[str, Any]) -> Path:
        return self.directory / f"universal-{Path(found['path']).name}"
