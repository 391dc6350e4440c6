"""`memkernels store`: the key-value stores on disk, from the command line."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from memkernels.cli.command import console, one_line_errors

if TYPE_CHECKING:
    from memkernels.cli.records import Codec
    from memkernels.store import KeyValueStore

store_app = typer.Typer(no_args_is_help=True, help="Key-value stores on disk: look into them, fill them, check them.")

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Text = Annotated[bool, typer.Option("--text", help="Values of one uint8 dimension are UTF-8 text.")]
Fields = Annotated[Optional[list[str]], typer.Option("--column", help="Of a new store, e.g. value:float32:64 (NAME:DTYPE[:SIZES]).")]  # noqa: UP045
KeyType = Annotated[Optional[str], typer.Option(help="Of a new store: int64, bytes (in hexadecimal) or str.")]  # noqa: UP045
KeyName = Annotated[str, typer.Option("--key", help="Name of the keys' field.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


@store_app.command()
@one_line_errors
def info(folder: Folder, as_json: Json = False) -> None:
    """What a store holds, and what it costs."""
    from rich.table import Table
    from rich.text import Text as Plain

    from memkernels.cli.records import describe

    with _reading(folder) as store:
        size = _bytes(folder)
        values = {name: describe(*column) for name, column in store.columns.items()}
        payload = sum(dtype.itemsize * _count(shape) for shape, dtype in store.columns.values())
        found = dict(keys=len(store), key_type=store.key_type, columns=values, bytes_on_disk=size, bytes_of_values=payload * len(store))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(title=Plain(str(folder), "table.title"), show_header=False)  # not as markup: names may have brackets
    table.add_row("keys", f"{found['keys']:,}, {found['key_type']}")
    for name, text in values.items():
        table.add_row(Plain(f"column {name}"), text)
    table.add_row("on disk", f"{size:,} bytes, values alone {found['bytes_of_values']:,}")
    console.print(table)


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * _count(shape[1:]) if shape else 1


@store_app.command()
@one_line_errors
def get(
    folder: Folder,
    key: Annotated[str, typer.Argument(help="The key; negative ones after --.")],
    column: Annotated[Optional[str], typer.Option(help="Only this column.")] = None,  # noqa: UP045
    text: Text = False,
) -> int:
    """Prints the value of a key as JSON (text as it is); exit code 1 if it is absent."""
    with _reading(folder) as store:
        codec = _codec(store, text)
        if column is not None and column not in codec.columns:
            from memkernels.cli.errors import OptionError

            raise OptionError(f"--column: expected one of {', '.join(codec.columns)}, got {column!r}")
        found = store.get(codec.parse_key(key))
        if found is None:
            print(f"memkernels: {folder}: no key {key!r}", file=sys.stderr)
            return 1
        row = found if isinstance(found, dict) else dict.fromkeys(codec.columns, found)
        names = [column] if column is not None else list(codec.columns)
        shown = {name: codec.show_value(name, row[name]) for name in names}
    if len(shown) > 1:
        print(json.dumps(shown, ensure_ascii=False))
    else:
        value = shown[names[0]]
        print(value if isinstance(value, str) else json.dumps(value))
    return 0


@store_app.command()
@one_line_errors
def put(
    folder: Folder,
    key: Annotated[str, typer.Argument(help="The key; negative ones after --.")],
    value: Annotated[str, typer.Argument(help="Its value, as JSON (text as it is); several columns as an object.")],
    text: Text = False,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Leave a key that is there as it is.")] = False,
    key_type: KeyType = None,
    columns: Fields = None,
) -> int:
    """Stores one value, durably; makes the store where there is none and --column says what it holds."""
    from memkernels.cli.errors import UserError
    from memkernels.cli.records import from_json, short

    with _writing(folder, key_type, columns) as store:
        codec = _codec(store, text)
        row: dict[str, Any] = dict.fromkeys(codec.columns, value)
        if len(row) > 1:
            try:
                row = from_json(value)
            except (ValueError, RecursionError):
                row = {}
            if not isinstance(row, dict) or set(row) != set(codec.columns):
                raise UserError(f"VALUE: expected an object with {', '.join(codec.columns)}, got {short(value)}")
        keys = codec.as_keys([codec.parse_key(key)])
        values = {name: codec.parse_column(name, [row[name]]) for name in codec.columns}
        kept = if_absent and bool(store.contains(keys)[0])
        store.store(keys, values, if_absent=if_absent)
        store.commit()
    if kept:
        print(f"memkernels: {folder}: {key!r} is there already, and was kept", file=sys.stderr)
    return int(kept)


@store_app.command("import")
@one_line_errors
def import_(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="FILE.csv, with a line of names, or FILE.jsonl.")],
    key: KeyName = "key",
    text: Text = False,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Leave keys that are there as they are.")] = False,
    key_type: KeyType = None,
    columns: Fields = None,
) -> None:
    """Stores every row of a file, all of them in one commit or, if one is wrong, none. Later rows of a key win."""
    from memkernels.cli.records import check_suffix

    check_suffix(file)
    with (
        _writing(folder, key_type, columns) as store,
        _bar(f"reading {file.name}", file.stat().st_size if file.is_file() else None) as advance,
    ):
        before, rows, codec = len(store), 0, _codec(store, text, key)
        codec.check_fields()
        for done, keys, values in codec.read(file):
            store.store(keys, values, if_absent=if_absent)
            rows += len(keys)
            advance(done)
        store.commit()
        after = len(store)
    print(f"{rows:,} rows of {file}: {after - before:,} new keys, {after:,} in all")


@store_app.command()
@one_line_errors
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="FILE.csv or FILE.jsonl; it appears whole or not at all.")],
    key: KeyName = "key",
    text: Text = False,
) -> None:
    """Writes everything that is stored to a file, in no order that means anything."""
    from memkernels.cli.errors import UserError
    from memkernels.cli.records import check_suffix

    check_suffix(file)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _reading(folder) as store, _bar(f"writing {file.name}", len(store)) as advance:
        codec, rows = _codec(store, text, key), 0
        codec.check_fields()
        try:
            with open(beside, "w", encoding="utf-8", newline="") as out:
                pairs = ((keys, v if isinstance(v, dict) else dict.fromkeys(codec.columns, v)) for keys, v in store.items())
                for rows in codec.write(out, file.suffix, pairs):
                    advance(rows)
            os.replace(beside, file)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror})") from None
        finally:
            beside.unlink(missing_ok=True) if beside.parent.is_dir() else None
    print(f"{rows:,} rows written to {file}")


@store_app.command()
@one_line_errors
def compact(
    folder: Folder, erase: Annotated[bool, typer.Option("--erase", help="Overwrite what was erased or replaced with zeros.")] = False
) -> None:
    """Gives back the space of rows that were erased or replaced."""
    from memkernels.store import KeyValueStore

    before = _bytes(folder)
    with KeyValueStore.open(folder, mode="w") as store, console.status("rewriting the store"):
        store.compact(erase=erase)
        keys = len(store)
    print(f"{keys:,} keys, {before:,} bytes before, {_bytes(folder):,} after")


@store_app.command()
@one_line_errors
def verify(folder: Folder) -> int:
    """Compares every checksum; exit code 1 if something is damaged."""
    with _reading(folder) as store, console.status("comparing checksums"):
        report = store.verify()
    for problem in report.problems:
        print(f"memkernels: {folder}: {problem}", file=sys.stderr)
    print(f"{report.rows:,} rows in {report.segments:,} segments, {report.bytes:,} bytes read: {'all right' if report.ok else 'DAMAGED'}")
    return int(not report.ok)


def _bytes(folder: Path) -> int:
    """Of the files on disk, without those that a writer removes meanwhile."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found = file.stat()
            size += found.st_blocks * 512 * stat.S_ISREG(found.st_mode)
    return size


def _codec(store: KeyValueStore, text: bool, key: str = "key") -> Codec:
    from memkernels.cli.records import Codec

    codec = Codec(store.key_type, store.columns, key, text)
    codec.check_columns()
    return codec


@contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    from memkernels.store import KeyValueStore

    with KeyValueStore.open(folder, mode="r") as store:
        yield store


@contextmanager
def _writing(folder: Path, key_type: str | None, columns: list[str] | None) -> Iterator[KeyValueStore]:
    """The store, made if it is not there; what fails then leaves none behind, but for one that another process has made meanwhile."""
    from memkernels.cli.errors import OptionError, UserError, check_option
    from memkernels.cli.records import as_columns
    from memkernels.store import KeyValueStore
    from memkernels.store.log import Log

    check_option("--key-type", [key_type], ("int64", "bytes", "str"))
    wanted = as_columns(columns or [])
    if Log.exists(folder) or (folder.exists() and not wanted):
        with KeyValueStore.open(folder, mode="w") as store:
            if (wanted and wanted != store.columns) or key_type not in (None, store.key_type):
                raise UserError(f"{folder}: is a store of other columns or keys than --column and --key-type say")
            yield store
        return
    there, missing = folder.exists(), [parent for parent in folder.parents if not parent.exists()]
    if not wanted:
        raise OptionError(f"--column: expected what a new store holds, e.g. value:float32:64; there is none at {folder} yet")
    with KeyValueStore(columns=wanted, key_type=key_type or "int64", path=folder) as store:
        empty = not len(store)
        try:
            yield store
        except BaseException:
            if empty:  # removed while it is locked
                _remove(folder, there)
                for parent in missing:
                    with suppress(OSError):  # somebody else uses it by now
                        parent.rmdir()
            raise


def _remove(folder: Path, keep: bool) -> None:
    """A store that holds nothing; with `keep` the folder, which was there before, stays."""
    for file in folder.iterdir() if keep else ():
        file.unlink()
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bar(text: str, total: int | None) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
