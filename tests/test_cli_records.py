"""Cells and JSON values as columns: exactly what torch.tensor makes of them, or an error that names the first wrong row."""

import json
import random

import pytest
import torch

from memkernels.cli import records
from memkernels.cli.errors import UserError
from memkernels.cli.records import Codec

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_column_has_the_bits_of_torch_tensor(dtype):
    draw = random.Random(3)
    numbers = [draw.uniform(-1, 1) * 2.0 ** draw.randrange(-40, 15) for _ in range(20000)]
    numbers += [draw.randrange(-60000, 60000) for _ in range(1000)] + [0.0, -0.0, 5e-324, 2.0**-149, float("inf"), float("-inf")]
    codec = Codec("int64", {"value": ((), dtype)})
    parsed = codec.parse_column("value", [json.dumps(x) for x in numbers])
    expected = torch.tensor(numbers, dtype=dtype)
    assert torch.equal(parsed.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_integers_to_the_ends_of_their_range(dtype):
    ends = torch.iinfo(dtype)
    codec = Codec("int64", {"value": ((2,), dtype)})
    assert codec.parse_column("value", [f"[{ends.min}, {ends.max}]"] * 3).tolist() == [[ends.min, ends.max]] * 3
    for wrong in (f"[{ends.min - 1}, 0]", f"[0, {ends.max + 1}]", "[0, 1.5]", "[0, true]", "[0, null]"):
        with pytest.raises(UserError, match="value: expected"):
            codec.parse_column("value", [wrong])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[1]", r"expected float32 \[2\], got shape \[1\]"),
        ("[[1, 2]]", r"expected float32 \[2\], got shape \[1, 2\]"),
        ("[1, 1e39]", r"expected float32 \[2\], got '\[1, 1e39\]'"),
        ("[1, [2]]", r"expected float32 \[2\], got '\[1, \[2\]\]'"),
        ("[1", r"expected float32 \[2\], got '\[1'"),
        ("2], [3", r"expected float32 \[2\], got '2\], \[3'"),
        ("[" * 100000, r"expected float32 \[2\], got '\[\[\["),
        ("1" + "0" * 5000, r"expected float32 \[2\], got '1000"),
    ],
)
def test_the_first_wrong_row_of_a_batch_is_named(tmp_path, monkeypatch, wrong, message):
    """Among right ones and before others that are wrong, in the second batch."""
    monkeypatch.setattr(records, "BATCH", 8)
    file = tmp_path / "a.csv"
    cells = ["[1, 2]"] * 11 + [wrong, "[1, 2]", "no", "[3, 4]"]
    file.write_text("key,value\n" + "".join(f'{i},"{cell}"\n' for i, cell in enumerate(cells)))
    codec = Codec("int64", {"value": ((2,), torch.float32)})
    batches = codec.read(file)
    done, keys, values = next(batches)
    assert keys.tolist() == list(range(8)) and values["value"].tolist() == [[1.0, 2.0]] * 8
    assert done == len("key,value\n") + 8 * len('0,"[1, 2]"\n')
    with pytest.raises(UserError, match=f"a.csv: row 12: value: {message}"):
        next(batches)


def test_rows_without_width():
    codec = Codec("str", {"none": ((0,), torch.float32), "text": ((0,), torch.uint8)}, text=True)
    keys, values = codec.parse([{"key": name, "none": "[]", "text": ""} for name in "ab"])
    assert keys == ["a", "b"] and {name: tuple(value.shape) for name, value in values.items()} == {"none": (2, 0), "text": (2, 0)}
