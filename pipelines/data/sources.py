"""Where demonstrations come from: local paths, directories, globs, URIs, hub data sets. One raw row at a time.

A raw row is `{"source": "file:row", "row": JSON text, "reason": why it could not be read, else empty}`: bad lines travel with the good
ones and are counted; their row is what stands there.
"""

import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.data.generated import GENERATED
from pipelines.run.artifacts import StageError
from pipelines.settings import Demonstrations

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets.save_to_disk` puts beside the rows."""
SHOWN = 1000
"""characters at most of a line that cannot be read"""
RawRow = dict[str, str]


def is_hub(file: str) -> bool:
    """Whether a name that `find` gave is a hub data set."""
    return file.startswith("hub:")


def find(path: str, split: str, must: bool = False, key: str = "demonstrations.path") -> list[str]:
    """The files behind a path.

    Args:
        path: a file, directory, glob or URI.
        split: in a directory with a file or folder of that name, only that one is taken; a glob says itself what it wants.
        key: the setting that says `path`, for errors.
        must: among several files there has to be one of that name.

    Returns:
        full paths or URIs, sorted; `["hub:ID"]` for a hub data set.

    Raises:
        StageError: nothing is there, or nothing that can be read.
    """
    if "://" not in path and not glob.has_magic(path) and not Path(path).exists():
        if HUB_ID.match(path) and not path.endswith(SUFFIXES):
            return [f"hub:{path}"]
        raise StageError(f"{key}={path!r}: there is no such file or directory (in {Path.cwd()}): check the path")
    try:
        fs, root = filesystem(path)
        found = fs.glob(root) if glob.has_magic(root) else fs.find(root) if fs.isdir(root) else [root]
    except (OSError, ValueError, ImportError) as error:
        raise StageError(f"{key}={path!r} cannot be listed: {error}: check the address, and who may read it") from None
    files = sorted(str(file) for file in found if _suffix(str(file)) and Path(str(file)).name not in NO_ROWS)
    if not found and glob.has_magic(root):
        raise StageError(f"{key}={path!r}: nothing matches {root}: check the directory and the pattern")
    asked = must or not glob.has_magic(path)
    # A directory that was asked for may itself be called as a split: that tells none of its files from the others.
    folders = {file: Path(file).parent.name for file in files if Path(file).parent != Path(root)}
    named = [file for file in files if asked and split in (Path(file).name.split(".")[0].split("-")[0], folders.get(file))]
    if not files:
        raise StageError(f"{key}={path!r} holds no file that ends in {', '.join(SUFFIXES)} (or one of them with .gz)")
    if must and len(files) > 1 and not named and Path(root).name != split:
        names = ", ".join(Path(file).name for file in files[:9])
        raise StageError(f"{key}={path!r} holds no file or folder of the split {split!r}, but {names}")
    return [str(fs.unstrip_protocol(file)) if "://" in path else str(Path(file).resolve()) for file in named or files]


def origin(settings: Demonstrations, split: str) -> tuple[list[str], str] | None:
    """(files, split name) of a split of the demonstrations; None where it is cut from the training data or absent."""
    if settings.path in GENERATED:
        return [settings.path], split
    section = settings.section
    train = find(settings.path, settings.split, must=settings.split != "train", key=f"{section}.path")
    if settings.held_out_path is None and settings.held_out_split is None:
        return (train, settings.split) if split == "train" else None
    name = settings.held_out_split or settings.split
    key = f"{section}.held_out_path" if settings.held_out_path else f"{section}.path"
    held_out = find(settings.held_out_path or settings.path, name, settings.held_out_split is not None, key)
    if not is_hub(train[0]):
        if held_out == train:
            # One file for both: held-out rows are cut from it.
            return (train, settings.split) if split == "train" else None
        train = [file for file in train if file not in held_out]
    return (train, settings.split) if split == "train" else (held_out, name)


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URI, and the path in it. s3:// and gs:// without fsspec's packages for them (s3fs, gcsfs) are
    read by pyarrow's own clients."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError:
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        fs, path = FileSystem.from_uri(uri)
        return ArrowFSWrapper(fs), path


def identity(files: list[str], subset: str | None, split: str) -> list[Any]:
    """What identifies the content of files, for a fingerprint: local files by content, remote ones by what their store says.

    Raises:
        StageError: a file is not there or cannot be opened.
    """
    return [[file, subset, split] if is_hub(file) else [Path(file).name, _mark(file)] for file in files]


def _mark(file: str) -> Any:
    try:
        if "://" in file:
            fs, path = filesystem(file)
            return fs.ukey(path)
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise StageError(
            f"{file} cannot be read: {error.strerror or 'there is no such file'}: check the path, and who may read it"
        ) from None


def read(file: str, subset: str | None = None, split: str = "train") -> Iterator[RawRow]:
    """Rows of one file, in order.

    Raises:
        StageError: the file as a whole cannot be read; the text names it.
    """
    if is_hub(file):
        yield from _read_hub(file.removeprefix("hub:"), subset, split)
        return
    readers = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow, ".csv": _read_csv}
    name = Path(file).name
    try:
        for number, parsed in enumerate(readers[_suffix(file)](file), start=1):
            if parsed is not None:
                row, reason = parsed
                yield {"source": f"{name}:{number}", "row": row, "reason": reason}
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StageError(f"{file} cannot be read as {_suffix(file)[1:]}: {said}. Mend or remove it, or rename it to what it is") from None


Parsed = tuple[str, str]
"""a row as JSON, and why it cannot be used; in a file of lines None stands for an empty one, which counts as a line"""


def _suffix(file: str) -> str:
    name = file.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _open(file: str) -> Any:
    fs, path = filesystem(file)
    return fs.open(path, "rb", compression="infer")


def _read_lines(file: str) -> Iterator[Parsed | None]:
    with _open(file) as lines:
        yield from (_parse(line) if line.strip() else None for line in lines)


def _read_json(file: str) -> Iterator[Parsed | None]:
    with _open(file) as opened:
        content = opened.read().removeprefix(codecs.BOM_UTF8)
    try:
        document = json.loads(content)
    except ValueError:
        if content.lstrip()[:1] != b"{":
            raise
        # JSON lines under the name .json.
        yield from (_parse(line) if line.strip() else None for line in content.splitlines())
        return
    rows = document if isinstance(document, list) else [document]
    yield from (_object(row) for row in rows)


def _read_parquet(file: str) -> Iterator[Parsed]:
    import pyarrow.parquet as pq

    with _open(file) as opened:
        for batch in pq.ParquetFile(opened).iter_batches(1024):
            yield from _rows_of(batch)


def _read_arrow(file: str) -> Iterator[Parsed]:
    import pyarrow as pa

    with _open(file) as opened:
        content = opened.read()
    try:
        reader: Any = pa.ipc.open_file(content)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        batches = pa.ipc.open_stream(content)
    for batch in batches:
        yield from _rows_of(batch)


def _rows_of(batch: Any) -> Iterator[Parsed]:
    """Rows of an arrow batch. A string that is not UTF-8 spoils its row, not the file."""
    try:
        yield from [_object(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield _object(batch.slice(number, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield "", f"not UTF-8: byte {error.start} of a string"


def _read_csv(file: str) -> Iterator[Parsed]:
    # A long text is a row like others; the reader's own bound of 131,072 characters would end the file.
    csv.field_size_limit(2**31 - 1)
    with _open(file) as opened:
        # A wrong byte spoils its row, not the file.
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
        last = ""

        def lines() -> Iterator[str]:
            nonlocal last
            for line in text:
                last = line
                yield line

        # Strict: a stray quote would else make one field of all rows up to the next quote, or to the end.
        reader, header = csv.reader(lines(), strict=True), list[str]()
        while True:
            begun = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                open_yet = "end of data" in str(error)
                if not header or open_yet or reader.line_num > begun or last.count('"') % 2:
                    # Behind it nobody knows where a row begins.
                    what = "is not closed" if open_yet else f"is closed in line {reader.line_num} with more text behind it"
                    raise csv.Error(f'the row in line {begun} opens a quote that {what} (within a text, write "" for a quote)') from None
                yield "", f'broken CSV: {error} (within a text, write "" for a quote)'
                continue
            if not header:
                header = row
            elif len(row) > len(header):
                yield "", "the row has more fields than the header"
            elif row:
                yield _object(dict(itertools.zip_longest(header, row)))


def _read_hub(name: str, subset: str | None, split: str) -> Iterator[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001
        # The hub client raises many kinds; all mean the same to the reader.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StageError(
            f"hub data set {name!r} (subset {subset!r}, split {split!r}) cannot be loaded: {first.rstrip('.')}. "
            "Check the name and the network, or give a local path"
        ) from None
    for number, row in enumerate(rows, start=1):
        text, reason = _object(row)
        yield {"source": f"{name}/{split}:{number}", "row": text, "reason": reason}


def _parse(line: bytes) -> Parsed:
    try:
        # Some editors begin a file with a mark of its encoding.
        return _object(json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8")))
    except UnicodeDecodeError as error:
        return _as_it_stands(line), f"not UTF-8: byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        return _as_it_stands(line), f"broken JSON: {error}"


def _as_it_stands(line: bytes) -> str:
    """For a person to look at, among the rejected rows."""
    return json.dumps(line.decode("utf-8", errors="replace").rstrip("\r\n")[:SHOWN])


def _object(row: Any) -> Parsed:
    if not isinstance(row, dict):
        return json.dumps(row, default=str)[:SHOWN], f"the row is {type(row).__name__}, not an object with columns"
    return json.dumps(row, default=str), ""
