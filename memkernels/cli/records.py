"""Rows of a key-value store as lines of a CSV or JSONL file, both ways."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from memkernels.cli.errors import OptionError, UserError

FORMATS = (".csv", ".jsonl")
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
BATCH = 8192  # rows
Columns = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{cut(text, 60)} is beyond float64")  # Infinity is a number of its own
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object with a field twice")
    return found


# json.loads with an option makes a decoder for every call
from_json = json.JSONDecoder(parse_float=_number, object_pairs_hook=_object).decode


class Codec(NamedTuple):
    """What keys and values look like: `key` is the name of the key's field; `text`: rows of uint8 are text, zero bytes behind."""

    key_type: str
    columns: Columns
    key: str = "key"
    text: bool = False

    def parse_key(self, got: Any) -> Any:
        """A key, from what a line or the command line has: bytes are written in hexadecimal."""
        if self.key_type == "int64":
            number = got if isinstance(got, int) and not isinstance(got, bool) else None
            if isinstance(got, str) and re.fullmatch(r"\s*[+-]?\d{1,100}\s*", got):
                number = int(got)
            if number is None or not -(2**63) <= number < 2**63:
                raise UserError(f"{self.key}: expected an int64, got {short(got)}")
            return number
        if not isinstance(got, str):
            raise UserError(f"{self.key}: expected a string, got {short(got)}")
        if self.key_type == "str":
            if _utf8(got) is None:
                raise UserError(f"{self.key}: expected a text with a UTF-8 form, got {short(got)}")
            return got
        try:
            return bytes.fromhex(got)
        except ValueError:
            raise UserError(f"{self.key}: expected bytes in hexadecimal, got {short(got)}") from None

    def show_key(self, key: Any) -> Any:
        return key.hex() if isinstance(key, bytes) else key

    def check_fields(self) -> None:
        """Each field of a row has a name of its own."""
        if self.key in self.columns:
            raise UserError(f"--key: expected a name that no column has, got {self.key!r}")

    def check_columns(self) -> None:
        """All values can be shown."""
        for name, (shape, dtype) in self.columns.items():
            if dtype.is_complex:
                raise UserError(f"{name}: {describe(shape, dtype)} has no form in JSON")

    def is_text(self, column: str) -> bool:
        shape, dtype = self.columns[column]
        return self.text and dtype == torch.uint8 and len(shape) == 1

    def parse_column(self, column: str, got: list[Any]) -> torch.Tensor:
        """Values of rows, each from a string of the command line or of a CSV cell, or from what JSON has; the error is of the first row."""
        shape, dtype = self.columns[column]
        if self.is_text(column):
            return self._texts(column, got, shape[0])
        try:
            plain = [from_json(cell.lower() if cell in ("True", "False") else cell) if isinstance(cell, str) else cell for cell in got]
            values = _exact(plain, dtype)
        except (ValueError, TypeError, RuntimeError, OverflowError, RecursionError):
            raise UserError(f"{column}: expected {describe(shape, dtype)}, got {short(got[0])}") from None
        told = shape[: shape.index(0) + 1] if 0 in shape else shape  # an empty list does not say what it is empty of
        if tuple(values.shape[1:]) != told:
            raise UserError(f"{column}: expected {describe(shape, dtype)}, got shape {list(values.shape[1:])}")
        return values.view(len(got), *shape)

    def _texts(self, column: str, got: list[Any], width: int) -> torch.Tensor:
        joined = bytearray()
        for text in got:
            data = _utf8(text) if isinstance(text, str) else None
            if data is None or len(data) > width or data.endswith(b"\0"):
                what = f"{len(data)} bytes" if data is not None else short(text)
                raise UserError(f"{column}: expected a text of at most {width} bytes of UTF-8, got {what}")
            joined += data.ljust(width, b"\0")
        values = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        return values.view(len(got), width)

    def show_value(self, column: str, value: torch.Tensor, errors: str = "replace") -> Any:
        """The value as JSON has it; `errors`: of bytes that are no UTF-8 in a column of text, as `bytes.decode` takes it."""
        if self.is_text(column):
            return bytes(value.tolist()).rstrip(b"\0").decode("utf-8", errors)
        return value.tolist()

    def as_keys(self, keys: list[Any]) -> Any:
        """Keys of `parse_key` as `store` takes them."""
        return torch.tensor(keys) if self.key_type == "int64" else keys

    def parse(self, records: list[dict[str, Any]]) -> tuple[Any, dict[str, torch.Tensor]]:
        """Rows as the keys and values of one call of `store`. What is wrong with one of many is told by `parse` of that one."""
        expected = [self.key, *self.columns]
        for record in records:
            if set(record) != set(expected):
                raise UserError(f"expected fields {', '.join(expected)}, got {_names(record) or 'none'}")
        keys = self.as_keys([self.parse_key(record[self.key]) for record in records])
        return keys, {name: self.parse_column(name, [record[name] for record in records]) for name in self.columns}

    def read(self, path: Path) -> Iterator[tuple[int, Any, dict[str, torch.Tensor]]]:
        """The rows of a file, many at a time, as `parse` gives them, and how many bytes of the file are done then.

        Raises UserError that names file and row.
        """
        with _opened(path) as file:
            lines = _counted(file)
            rows = _csv(path, lines, [self.key, *self.columns]) if path.suffix == ".csv" else _jsonl(path, lines)
            before = 0
            while records := list(itertools.islice(rows, BATCH)):
                try:
                    parsed = self.parse(records)
                except UserError:
                    self._find_wrong(path, before, records)
                    raise
                yield lines.done, *parsed
                before += len(records)

    def _find_wrong(self, path: Path, before: int, records: list[dict[str, Any]]) -> None:
        for number, record in enumerate(records, before + 1):
            try:
                self.parse([record])
            except UserError as error:
                raise UserError(f"{path}: row {number}: {error}") from None

    def write(self, file: IO[str], suffix: str, batches: Iterable[tuple[Any, dict[str, torch.Tensor]]]) -> Iterator[int]:
        """Writes rows; yields the number of them after every batch."""
        names, rows = [self.key, *self.columns], 0
        table = csv.writer(file)
        if suffix == ".csv":
            table.writerow(names)
        for keys, values in batches:
            plain = keys.tolist() if isinstance(keys, torch.Tensor) else keys
            for i, key in enumerate(plain):
                try:
                    fields = [self.show_key(key), *(self.show_value(name, values[name][i], "strict") for name in self.columns)]
                except UnicodeDecodeError:
                    raise UserError(f"key {short(self.show_key(key))}: not UTF-8 text: without --text its bytes are written") from None
                if suffix == ".csv":
                    table.writerow([f if isinstance(f, str) else json.dumps(f) for f in fields])
                else:
                    file.write(json.dumps(dict(zip(names, fields)), ensure_ascii=False) + "\n")
            rows += len(plain)
            yield rows


def as_columns(options: list[str]) -> Columns:
    """--column NAME:DTYPE[:SIZE,SIZE...] as the columns of a store."""
    found: Columns = {}
    for option in options:
        name, _, rest = option.partition(":")
        dtype, _, sizes = rest.partition(":")
        if not name or dtype not in DTYPES or not re.fullmatch(r"(\d{1,18}(,\d{1,18})*)?", sizes) or name in found:
            raise OptionError(f"--column: expected distinct NAME:DTYPE or NAME:DTYPE:SIZES (DTYPE: {', '.join(DTYPES)}), got {option!r}")
        found[name] = tuple(int(n) for n in sizes.split(",") if n), getattr(torch, dtype)
    return found


def describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name} {list(shape)}" if shape else f"one {name}"


def check_suffix(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise OptionError(f"FILE: expected a name that ends in {' or '.join(FORMATS)}, got {path.name!r}")


def _exact(plain: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """torch.tensor cuts 1.5 to 1, counts True as 1 and takes 1e39 for infinity in float32: here none of them fits."""
    leaves = plain
    while (kinds := set(map(type, leaves))) == {list}:
        leaves = list(itertools.chain.from_iterable(leaves))
    if not kinds <= ({int, float} if dtype.is_floating_point else {bool} if dtype == torch.bool else {int}):
        raise ValueError
    if not dtype.is_floating_point:
        limits = None if dtype == torch.bool else torch.iinfo(dtype)
        if limits and leaves and not limits.min <= min(leaves) <= max(leaves) <= limits.max:
            raise ValueError
        return torch.tensor(plain, dtype=dtype)
    wide = torch.tensor(plain, dtype=torch.float64)
    values = wide.to(dtype)
    largest, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    limit = largest + math.ldexp(step, math.frexp(largest)[1] - 2)  # rounded, it would be beyond; some of 8 bits are cut to the largest
    if bool((wide.isfinite() & (wide.abs() >= limit)).any()) or not torch.equal(wide.isinf(), values.double().isinf()):
        raise OverflowError
    return values


def _utf8(text: str) -> bytes | None:
    """None for half of a surrogate pair, which JSON may have."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def short(got: Any) -> str:
    try:
        text = repr(got)
    except RecursionError:
        return "lists in lists, too deep"
    return cut(text, 60)


def cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def _names(found: Iterable[str]) -> str:
    return cut(", ".join(found), 300)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class _counted:
    """The lines of a file as text, and how many bytes of it they were."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.done = file, 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self.file, 1):
            self.done += len(line)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.file.name}: line {number}: not UTF-8 text (byte 0x{line[error.start]:02x})") from None


def _csv(path: Path, lines: _counted, expected: list[str]) -> Iterator[dict[str, Any]]:
    """A file of no rows still has its line of names."""
    csv.field_size_limit(sys.maxsize)  # of 131072 characters, a row of ten thousand numbers has more
    table = csv.reader(lines, strict=True)
    try:
        names = next(table, [])
        if not set(expected) <= set(names):
            raise UserError(f"{path}: line 1: expected the names {', '.join(expected)}, got {_names(names) or 'none'}")
        if len(set(names)) < len(names):
            raise UserError(f"{path}: line 1: expected distinct names, got {_names(names)}")
        for cells in table:
            if len(cells) != len(names):
                raise UserError(f"{path}: line {table.line_num}: expected {len(names)} fields as in the first line, got {len(cells)}")
            yield dict(zip(names, cells))
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num}: {error}") from None


def _jsonl(path: Path, lines: _counted) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not JSON ({error})") from None
        except RecursionError:
            raise UserError(f"{path}: line {number}: not JSON (nested too deep)") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number}: expected an object with fields, got {short(record)}")
        yield record
