"""The columns of a store's values: their shapes and dtypes, and the checks of what is to be stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from memkernels._checks import check_choice, check_dense, check_tensor, fail
from memkernels.ops.store_gather import OP as GATHER

Columns = dict[str, tuple[tuple[int, ...], torch.dtype]]
ONE = "value"  # the column of a store that has one


def as_columns(op: str, value_shape: Any, dtype: Any, columns: Any) -> Columns:
    """`value_shape` and `dtype`, or `columns`, as {name: (shape, dtype)}."""
    if columns is None:
        return {ONE: (_shape(op, "value_shape", value_shape), _dtype(op, "dtype", dtype))}
    if value_shape != ():
        fail(op, "value_shape", "() where columns are given", value_shape)
    if not isinstance(columns, Mapping) or not columns:
        fail(op, "columns", "{name: (shape, dtype)}", repr(columns), TypeError)
    found: Columns = {}
    for name, what in columns.items():
        if not isinstance(name, str) or not name:
            fail(op, "columns", "names that are strings", repr(name), TypeError)
        if not isinstance(what, (tuple, list)) or len(what) != 2:
            fail(op, f"columns[{name!r}]", "(shape, dtype)", repr(what), TypeError)
        found[name] = _shape(op, f"columns[{name!r}]", what[0]), _dtype(op, f"columns[{name!r}]", what[1])
    return found


def _shape(op: str, argument: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (int, Sequence)):
        fail(op, argument, "a size or a sequence of sizes", type(shape).__name__, TypeError)
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        fail(op, argument, "sizes of 0 or more", repr(shape))
    return sizes


def _dtype(op: str, argument: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        fail(op, argument, "a torch.dtype", repr(dtype), TypeError)
    if (dtype.is_complex and dtype == torch.complex32) or "q" in str(dtype).removeprefix("torch.")[:1]:
        fail(op, argument, "a dtype of plain numbers", str(dtype).removeprefix("torch."), TypeError)
    return dtype


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def as_values(op: str, columns: Columns, values: Any, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The values of a call, one tensor "n ..." for every column."""
    if isinstance(values, Mapping):
        if set(values) != set(columns):
            fail(op, "values", f"columns {', '.join(sorted(columns))}", ", ".join(sorted(map(str, values))) or "none")
        return {name: _values(op, f"values[{name!r}]", columns[name], values[name], count, device) for name in columns}
    if list(columns) != [ONE]:
        fail(op, "values", f"a dict of tensors: {', '.join(columns)}", type(values).__name__, TypeError)
    return {ONE: _values(op, "values", columns[ONE], values, count, device)}


def _values(op: str, argument: str, column: Any, got: Any, count: int, device: torch.device) -> torch.Tensor:
    shape, dtype = column
    check_tensor(op, argument, got)
    check_dense(op, argument, got)
    if got.is_meta:
        fail(op, argument, "values on a device that holds data", "device meta")
    if got.dtype != dtype:
        fail(op, argument, str(dtype).removeprefix("torch."), str(got.dtype).removeprefix("torch."), TypeError)
    if tuple(got.shape) != (count, *shape):
        fail(op, argument, f"shape {(count, *shape)}, one value for each key", f"shape {tuple(got.shape)}")
    return got.detach().to(device).resolve_conj().resolve_neg()


def as_names(op: str, names: Any, columns: Columns) -> list[str]:
    """The columns that were asked for by name, or by names; all for None."""
    if names is not None and not isinstance(names, Iterable):
        fail(op, "columns", "names of columns, or None", type(names).__name__, TypeError)
    found = list(columns) if names is None else [names] if isinstance(names, str) else list(names)
    for name in found:
        check_choice(op, "columns", name, columns)
    return found


def as_default(op: str, name: str, column: Any, default: Any, device: torch.device) -> torch.Tensor:
    """What absent keys get in a column: "1 ...", zeros unless a number or a tensor is given."""
    shape, dtype = column
    if isinstance(default, Mapping):
        default = default.get(name)
    if default is None:
        return torch.zeros(1, *shape, dtype=dtype, device=device)
    if isinstance(default, torch.Tensor) and default.dtype != dtype:
        fail(op, "default", str(dtype).removeprefix("torch."), str(default.dtype).removeprefix("torch."), TypeError)
    if isinstance(default, float) and not dtype.is_floating_point and not dtype.is_complex and default % 1:  # nor NaN
        fail(op, "default", f"a number that {str(dtype).removeprefix('torch.')} holds", default)
    try:
        given = torch.as_tensor(default, dtype=dtype, device=device).detach()
        return given.expand(1, *shape).contiguous()
    except (RuntimeError, TypeError, ValueError) as error:
        fail(op, "default", f"a number or a tensor that fits shape {shape}", f"{type(default).__name__} ({error})")
        raise


def as_bytes(rows: torch.Tensor, width: int) -> torch.Tensor:
    """ "rows ..." seen as uint8 "rows bytes"; each row must be a run of memory."""
    n = rows.shape[0]
    if n == 0 or width == 0:
        return torch.empty(n, width, dtype=torch.uint8, device=rows.device)
    if rows.dim() > 1 and not rows[0].is_contiguous():
        rows = rows.contiguous()
    flat = torch.as_strided(rows, (n, width // rows.itemsize), (rows.stride(0), 1))
    return flat.view(torch.uint8) if flat.is_contiguous() else _strided_bytes(flat, width)


def _strided_bytes(flat: torch.Tensor, width: int) -> torch.Tensor:
    """Rows with a gap between them: torch views the last dimension only, whose stride is 1."""
    return flat.view(torch.uint8) if flat.stride(0) >= 0 else flat.contiguous().view(torch.uint8)


def from_bytes(rows: torch.Tensor, column: Any) -> torch.Tensor:
    shape, dtype = column
    if rows.numel() == 0:
        return torch.empty(rows.shape[0], *shape, dtype=dtype, device=rows.device)
    return rows.view(dtype).view(rows.shape[0], *shape)


def gather(column: Any, chunks: Sequence[torch.Tensor], firsts: Sequence[int], rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """The values of `rows` in a column whose chunks are seen as bytes. They are the store's own and are not checked again at each call,
    as `store_gather` does: of 39 chunks that takes 30 us, as much as the rest of a retrieve of one key."""
    (found,) = GATHER([*chunks, as_bytes(default, row_bytes(*column))], firsts, rows)
    return from_bytes(found, column)
