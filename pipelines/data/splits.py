"""The rows of a data set as they are read: training and held-out ones in shards, bad ones in rejected.parquet.

Held out are prompts, by a hash of what they say: all responses to one are on the same side, whatever is added later.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.data import layouts, sources
from pipelines.records import DEMONSTRATION, PREFERENCE, REJECTED, write_rows
from pipelines.run.artifacts import StageError
from pipelines.settings import Demonstrations, Preferences

log = logging.getLogger(__name__)
SPLITS = ("train", "held_out")
HOPELESS = 10_000
"""Rows read without a single good one, after which the rest is not read."""
MANY = 1000
"""Prompts after which nobody asks how many there are."""


class Splits:
    """Takes rows in order, draws held-out ones, writes shards, counts.

    Args:
        directory: to write to.
        settings: of the data.
    """

    def __init__(self, directory: Path, settings: Demonstrations):
        self.directory, self.settings = directory, settings
        self.schema = PREFERENCE if isinstance(settings, Preferences) else DEMONSTRATION
        self.ids: set[bytes] = set()
        self.held_out: set[bytes] = set()
        """prompts that were drawn"""
        self.buffers: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.rows = dict.fromkeys(SPLITS, 0)
        self.written = dict.fromkeys(SPLITS, 0)
        self.rejected: list[dict[str, Any]] = []
        self.prompts: set[bytes] = set()
        """that were met, up to MANY of them, where rows are drawn"""
        self.read = self.truncated = 0
        self.cuts = False
        """whether held-out rows were drawn from those to train on"""

    def take(self, source_split: str, rows: Iterable[dict[str, Any]]) -> None:
        """Takes the rows of one source until all splits that it feeds are full."""
        # Said once: to know it, the files are looked for, which may be thousands in a store.
        cuts = self._cuts(source_split)
        self.cuts |= cuts
        fed = SPLITS if cuts else (source_split,)
        for row in rows:
            if all(self._full(split) for split in fed) or len(self.rejected) == self.read == HOPELESS:
                break
            self.read += 1
            if row["reason"]:
                self._reject(row, row["reason"])
                continue
            record = json.loads(row["record"])
            key = bytes.fromhex(record["id"])
            if key in self.ids:
                self._reject(row, "the same prompt and response stand in an earlier row")
                continue
            split = self._drawn(record["prompt"]) if cuts else source_split
            if not self._full(split):
                self.ids.add(key)
                self._add(split, record)

    def _add(self, split: str, record: dict[str, Any]) -> None:
        self.rows[split] += 1
        self.truncated += record.pop("truncated")
        self.buffers[split].append(record)
        if len(self.buffers[split]) == self.settings.shard_rows:
            self._flush(split)

    def _full(self, split: str) -> bool:
        limit = self.settings.limit if split == "train" else self.settings.held_out_limit
        return limit is not None and self.rows[split] >= limit

    def close(self) -> dict[str, Any]:
        """Writes what is left; returns the counts."""
        for split in SPLITS:
            self._flush(split)
        write_rows(self.directory / "rejected.parquet", self.rejected, REJECTED)
        return {**self.rows, "rejected": len(self.rejected), "read": self.read, "truncated": self.truncated}

    def _cuts(self, source_split: str) -> bool:
        """Whether held-out rows are cut from this source."""
        return source_split == "train" and self.settings.held_out_fraction > 0 and sources.origin(self.settings, "held_out") is None

    def _drawn(self, prompt: list[dict[str, str]]) -> str:
        """The split of a row, where one source feeds both: the same for all responses to a prompt."""
        # Chosen by content: the same prompts stay held out when data is added.
        draw = hashlib.sha256(f"{self.settings.seed}:{json.dumps(prompt, ensure_ascii=False)}".encode()).digest()[:8]
        if len(self.prompts) < MANY:
            self.prompts.add(draw)
        if int.from_bytes(draw, "big") >= self.settings.held_out_fraction * 2**64:
            return "train"
        if self._full("held_out") and draw not in self.held_out:
            # Enough are held out: the others are there to learn from.
            return "train"
        self.held_out.add(draw)
        return "held_out"

    def _reject(self, row: dict[str, Any], reason: str) -> None:
        self.rejected.append({"source": row["source"], "reason": reason, "row": row["row"]})

    def _flush(self, split: str) -> None:
        if self.buffers[split]:
            folder = self.directory / split
            folder.mkdir(exist_ok=True)
            write_rows(folder / f"{self.written[split]:05d}.parquet", self.buffers[split], self.schema)
            self.written[split] += 1
            self.buffers[split] = []


def check(numbers: dict[str, Any], writer: Splits, settings: Demonstrations) -> None:
    """Whether there is something to train on, and not too much was set aside.

    Raises:
        StageError: there is not, or there was; the first rows concerned are shown.
    """
    rejected, read = numbers["rejected"], max(1, numbers["read"])
    if rejected:
        log.warning("%d of %d rows rejected, see %s", rejected, read, writer.directory / "rejected.parquet")
    kept = numbers["train"] + numbers["held_out"]
    # From preferences and prompts no policy learns how to end.
    if numbers["truncated"] > kept / 10 and settings.section == "demonstrations":
        told = "%d of %d responses are cut at %s.max_tokens=%d: they do not teach a policy to stop. Raise it, or leave the longest rows out"
        log.warning(told, numbers["truncated"], kept, settings.section, settings.max_tokens)
    if rejected == numbers["read"] > 0:
        raise unusable(settings.path, writer, settings)
    if rejected > settings.max_rejected_fraction * read:
        raise StageError(
            f"{rejected} of {read} rows of {settings.path} cannot be used, "
            f"more than {settings.section}.max_rejected_fraction={settings.max_rejected_fraction}. The first:\n{_listed(writer.rejected)}\n"
            f"All of them: {writer.directory / 'rejected.parquet'}"
        )
    met = f"{len(writer.prompts)}{' or more' if len(writer.prompts) == MANY else ''}"
    drawn = f"rows are held out by their prompts, of which the {numbers['read']} rows read have {met}"
    if not numbers["train"]:
        why = f": {drawn}" if writer.cuts and kept else ""
        read = f"{numbers['read']} rows read, {numbers['held_out']} of them held out{why}"
        raise StageError(
            f"{settings.path} holds no demonstration to train on: {read}; name a file with rows, hold out less, or name a held_out_path"
        )
    if writer.cuts and not numbers["held_out"]:
        told = "no row was held out: %s, each drawn with the chance of %s.held_out_fraction=%g: raise it, or name a held_out_path"
        log.warning(told, drawn, settings.section, settings.held_out_fraction)


def unusable(where: str, writer: Splits, settings: Demonstrations) -> StageError:
    """Says why not one of the rows read can be used."""
    if not writer.read:
        return StageError(f"{where} holds no row: name a file with rows")
    first = writer.rejected[0]
    # Of a wrong layout every row says the same: once is enough.
    alike = len({row["reason"] for row in writer.rejected[:5]}) == 1
    said = f", {first['source']}: {first['reason']}" if alike else f":\n{_listed(writer.rejected)}"
    mend = ""
    if any(layouts.is_of_columns(row["reason"]) for row in writer.rejected[:5]):
        sides = "chosen: YOURS, rejected: YOURS" if isinstance(settings, Preferences) else "completion: YOURS"
        columns = f"--{settings.section}.columns '{{prompt: YOURS, {sides}}}'"
        mend = f"{'. ' if alike else chr(10)}Name the layout with --{settings.section}.layout, or the columns ({columns})"
    return StageError(f"none of the {writer.read} rows read from {where} can be used. The first{said}{mend}")


def _listed(rejected: list[dict[str, Any]]) -> str:
    return "\n".join(f"  {row['source']}: {row['reason']}" for row in rejected[:5])
