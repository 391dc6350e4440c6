"""`memkernels store`, run what a user sees of it: exit code, output, files."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from memkernels.cli import records, store_app
from memkernels.cli.app import app
from memkernels.store import KeyValueStore
from memkernels.store.log import Log


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs `memkernels store ...` in a folder of its own: (standard output, standard error), after a check of the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            app(["store", *map(str, arguments)])
        out, error = capfd.readouterr()
        assert stop.value.code in ((0, None) if code == 0 else (code,)), (out, error)
        assert code == 0 or (error.startswith("memkernels: ") and error.count("\n") == 1) or code == 2, error
        return out, error

    return call


FRUIT = ("--key-type", "str", "--column", "value:uint8:16", "--text")


def test_apple_is_a_fruit(run, tmp_path):
    run("put", "food", "apple", "A fruit", *FRUIT)
    run("put", "food", "胡萝卜", "A vegetable", "--text")
    assert run("get", "food", "apple", "--text")[0] == "A fruit\n"
    assert run("get", "food", "胡萝卜", "--text")[0] == "A vegetable\n"
    assert json.loads(run("get", "food", "apple")[0])[:3] == [65, 32, 102]
    assert "no key 'pear'" in run("get", "food", "pear", code=1)[1]
    assert "is there already" in run("put", "food", "apple", "A tree", "--text", "--if-absent", code=1)[1]
    assert run("get", "food", "apple", "--text")[0] == "A fruit\n"
    shown = run("info", "food")[0]
    assert "2, str" in shown and "uint8 [16]" in shown
    found = json.loads(run("info", "food", "--json")[0])
    assert found["keys"] == 2 and found["key_type"] == "str" and found["columns"] == {"value": "uint8 [16]"} and found["bytes_on_disk"] > 0
    run("put", "food", "apple", "A tree", "--text")
    assert "2 keys" in run("compact", "food", "--erase")[0]
    assert run("get", "food", "apple", "--text")[0] == "A tree\n"
    assert "all right" in run("verify", "food")[0]
    run("put", "one", "", "1", "--key-type", "str", "--column", "value:int64")  # a commit whose keys have no byte
    assert run("get", "one", "")[0] == "1\n"


COLUMNS = ("--column", "v:float32:2", "--column", "n:int64", "--column", "ok:bool", "--column", "t:uint8:9")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("key_type", ["int64", "bytes", "str"])
def test_what_is_exported_is_imported(run, tmp_path, monkeypatch, suffix, key_type):
    monkeypatch.setattr(records, "BATCH", 3)
    keys = {"int64": [-(2**63), 0, 2**63 - 1, 7], "bytes": [b"\xff", b"", b"ab", b"\0"], "str": ["a,b", 'q"\n', "é", ""]}[key_type]
    values = {
        "v": torch.tensor([[0.1, 1e-30], [float("inf"), -0.0], [1.0, 2.0], [3.4e38, 4.0]]),
        "n": torch.tensor([2**53 + 1, -1, 0, 3]),
        "ok": torch.tensor([True, False, True, False]),
        "t": torch.stack([torch.tensor(list(t.encode().ljust(9, b"\0")), dtype=torch.uint8) for t in ("x,y", "[1, 2]", "敏捷", "")]),
    }
    columns = {name: (tuple(t.shape[1:]), t.dtype) for name, t in values.items()}
    with KeyValueStore(columns=columns, key_type=key_type, path=tmp_path / "a") as store:
        store.store(torch.tensor(keys) if key_type == "int64" else keys, values)
        store.commit()
    assert "4 rows" in run("export", "a", f"f.{suffix}", "--text", "--key", "k")[0]
    shown = run("import", "b", f"f.{suffix}", "--text", "--key", "k", "--key-type", key_type, *COLUMNS)[0]
    assert "4 rows of f." in shown and "4 new keys, 4 in all" in shown
    assert "0 new keys, 4 in all" in run("import", "b", f"f.{suffix}", "--text", "--key", "k")[0]
    with KeyValueStore.open(tmp_path / "b", mode="r") as store:
        found, there = store.retrieve(torch.tensor(keys) if key_type == "int64" else keys)
        assert there.all() and all(torch.equal(found[name], values[name]) for name in values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", f"f.{suffix}"]
    row = json.loads(run("get", "a", "--text", "--", *map(str, keys[2:3]))[0]) if key_type == "int64" else None
    assert row is None or row == {"v": [1.0, 2.0], "n": 0, "ok": True, "t": "敏捷"}


BAD = {
    "no_field.jsonl": ('{"key": 1}', "row 1: expected fields key, value, got key"),
    "value.jsonl": ('{"key": 1, "value": 2}\n{"key": 2, "value": "x"}', "row 2: value: expected one int64, got 'x'"),
    "half.jsonl": ('{"key": 1, "value": 2.5}', "row 1: value: expected one int64, got 2.5"),
    "digits.jsonl": ('{"key": "%s", "value": 1}' % ("9" * 5000), "row 1: key: expected an int64, got '999"),
    "big.jsonl": ('{"key": 1, "value": 9223372036854775808}', "value: expected one int64"),
    "key.jsonl": ('{"key": 1.5, "value": 2}', "row 1: key: expected an int64, got 1.5"),
    "json.jsonl": ('{"key": 1, "value": 2}\n{"key"', "line 2: not JSON"),
    "deep.jsonl": ("[" * 100_000, "line 1: not JSON"),
    "list.jsonl": ("[1]", "line 1: expected an object with fields, got [1]"),
    "cells.csv": ("key,value\n1,2\n1,2,3\n", "line 3: expected 2 fields as in the first line, got 3"),
    "large.jsonl": ('{"key": 1, "value": 1}\n{"key": 2, "value": -1e999}\n', "line 2: not JSON (-1e999 is beyond float64)"),
    "range.csv": ("key,value\n9223372036854775808,1\n", "row 1: key: expected an int64"),
    "empty.csv": ("", "line 1: expected the names key, value, got none"),
    "names.csv": ("key,other\n", "line 1: expected the names key, value, got key, other"),
    "quote.csv": ('key,value\n"1,2\n', "line 2: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_with_a_wrong_row_changes_nothing(run, tmp_path, name):
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    for store in ("old", "new"):
        if store == "old":
            run("put", "old", "5", "6", "--column", "value:int64")
        error = run("import", store, name, "--column", "value:int64", code=1)[1]
        assert name in error and message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "old"])
    assert json.loads(run("info", "old", "--json")[0])["keys"] == 1


def test_a_file_of_no_rows(run, tmp_path):
    (tmp_path / "none.csv").write_text("key,value\n")
    (tmp_path / "none.jsonl").write_text("")
    for name in ("none.csv", "none.jsonl"):
        assert run("import", "s", name, "--column", "value:int64")[0].strip() == f"0 rows of {name}: 0 new keys, 0 in all"


def test_errors(run, tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b'{"key": "\xff"}')
    (tmp_path / "file").write_text("x")
    run("put", "old", "--column", "value:float32:2", "--", "-5", "[1, 2.5]")
    assert json.loads(run("get", "old", "--", "-5")[0]) == [1.0, 2.5]
    for arguments, message in (
        (["get", "missing", "1"], "there is no store at"),
        (["get", "file", "1"], "there is no store at"),
        (["get", "old", "x"], "key: expected an int64, got 'x'"),
        (["put", "old", "1", "[1]"], "value: expected float32 [2], got shape [1]"),
        (["put", "old", "1", "hello"], "value: expected float32 [2], got 'hello'"),
        (["put", "old", "1", "[1,2]", "--column", "value:float32:3"], "is a store of other columns or keys"),
        (["import", "old", "none.csv"], "no such file"),
        (["import", "old", "binary.jsonl"], "not UTF-8"),
        (["export", "old", "file/x.csv"], "cannot be written"),
        (["export", "old", "x.csv", "--key", "value"], "--key: expected a name that no column has"),
        (["import", "old", "x.csv", "--key", "value"], "--key: expected a name that no column has"),
        (["put", "old", "1", "[1, 1e39]"], "value: expected float32 [2], got '[1, 1e39]'"),
        (["put", "old", "1", "[1, 1e999]"], "value: expected float32 [2], got '[1, 1e999]'"),
        (["compact", "missing"], "there is no store at"),
        (["verify", "missing"], "there is no store at"),
    ):
        assert message in run(*arguments, code=1)[1], arguments
    for arguments, message in (
        (["import", "old", "file.txt"], "FILE: expected a name that ends in .csv or .jsonl, got 'file.txt'"),
        (["put", "new", "1", "2"], "--column: expected what a new store holds"),
        (["put", "new", "1", "2", "--column", "value:float31"], "--column: expected distinct NAME:DTYPE"),
        (["put", "new", "1", "2", "--column", "v:int8", "--key-type", "int3"], "--key-type: expected one of int64, bytes, str"),
        (["get", "old", "1", "--column", "x"], "--column: expected one of value, got 'x'"),
    ):
        assert message in run(*arguments, code=2)[1], arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.jsonl", "file", "old"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "key,value,value\na,b,c\n", "line 1: expected distinct names, got key, value, value"),
        ("a.jsonl", '{"key": "\\\\ud800", "value": "x"}\n', "row 1: key: expected a text with a UTF-8 form"),
        ("a.jsonl", '{"key": "a", "value": "\\\\ud800"}\n', "row 1: value: expected a text of at most 16 bytes of UTF-8"),
    ],
)
def test_import_of_names_twice_and_of_no_text(tmp_path, name, content, message):
    from memkernels.cli.errors import UserError
    from memkernels.cli.records import Codec

    (tmp_path / name).write_text(content.replace("\\\\", "\\"))
    codec = Codec("str", {"value": ((16,), torch.uint8)}, text=True)
    with pytest.raises(UserError, match=message):
        list(codec.read(tmp_path / name))


def test_values_that_cannot_be_shown(run, tmp_path):
    for name, values in (("complex", torch.ones(1, dtype=torch.complex64)), ("bytes", torch.tensor([[255, 1]], dtype=torch.uint8))):
        with KeyValueStore(values.shape[1:], values.dtype, path=tmp_path / name) as store:
            store.store([1], values)
            store.commit()
    for arguments in (["get", "complex", "1"], ["put", "complex", "1", "1"], ["export", "complex", "x.csv"]):
        assert "value: one complex64 has no form in JSON" in run(*arguments, code=1)[1]
    assert "key 1: not UTF-8 text" in run("export", "bytes", "x.csv", "--text", code=1)[1]
    run("get", "bytes", "1", "--text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bytes", "complex"]


def test_what_fails_leaves_an_empty_folder_empty_and_the_store_of_another_process_alone(run, tmp_path, monkeypatch):
    column = ("--column", "value:float32")
    (tmp_path / "empty").mkdir()
    run("put", "empty", "1", "x", *column, code=1)
    assert not list((tmp_path / "empty").iterdir())
    made = []

    def looked(path):  # another process makes the store as soon as the command has looked
        monkeypatch.undo()
        made.append(KeyValueStore(path=tmp_path / "other"))
        made[0].store([1], torch.ones(1))
        made[0].commit()
        return False

    monkeypatch.setattr(Log, "exists", looked)
    assert "a store has one writer" in run("put", tmp_path / "other", "1", "2", *column, code=1)[1]
    made[0].close()
    assert run("get", tmp_path / "other", "1")[0] == "1.0\n"


def test_a_store_that_cannot_be_made_leaves_nothing(run, tmp_path):
    for column in ("value:float32:99999999999,99999999999", "value:float32:100000000000"):
        run("put", "new", "1", "1", "--column", column, code=1)
    run("put", "deep/er/new", "x", "1", "--column", "value:float32", code=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "deep").mkdir()
    run("put", "deep/er/new", "x", "1", "--column", "value:float32", code=1)
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("column", ["value:float32:2", "value:int64:2"])
def test_true_is_no_number(run, column):
    assert "value: expected" in run("put", "new", "1", "[true, 1]", "--column", column, code=1)[1]
    run("put", "new", "1", "[2, 1]", "--column", column)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_of_many_numbers_go_out_and_in(run, tmp_path, suffix):
    """Python's csv takes fields of 131072 characters."""
    wide = torch.randn(2, 20_000)
    with KeyValueStore(20_000, path=tmp_path / "wide") as store:
        store.store([1, 2], wide)
        store.commit()
    run("export", "wide", f"wide.{suffix}")
    run("import", "again", f"wide.{suffix}", "--column", "value:float32:20000")
    with KeyValueStore.open(tmp_path / "again") as store:
        assert torch.equal(store.retrieve([1, 2])[0], wide)


@pytest.mark.parametrize(
    ("redirected", "code", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "memkernels: standard output: No space left on device\n"),
        ("| sleep 0", 1, ""),
    ],
)
def test_standard_files_that_are_closed_or_full(tmp_path, redirected, code, error):
    with KeyValueStore((), dtype=torch.int64, path=tmp_path / "s") as store:
        store.store([1], torch.tensor([5]))
        store.commit()
    name = "\udcff.csv"  # no UTF-8: said as it is
    command = f'"$0" -c "from memkernels.cli import main; main()" store export s "$1" {redirected}; exit ${{PIPESTATUS[0]}}'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(["bash", "-c", command, sys.executable, name], cwd=tmp_path, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr.decode()) == (code, error)
    assert ended.stdout in (b"", b"1 rows written to \xff.csv\n")
    assert (tmp_path / name).read_text() == "key,value\n1,5\n"
    with KeyValueStore.open(tmp_path / "s") as store:
        assert store.verify().ok


def test_names_in_brackets_are_no_markup(run, tmp_path, monkeypatch):
    run("put", "[/x]", "1", '{"[bold]": 2, "[/y]": 3}', "--column", "[bold]:int64", "--column", "[/y]:int64")
    shown = run("info", "[/x]")[0]
    assert "[/x]" in shown and "column [bold]" in shown and "column [/y]" in shown
    monkeypatch.setattr(store_app, "console", Console(file=io.StringIO(), force_terminal=True))  # where the bar is drawn
    run("export", "[/x]", "[red].csv")
    run("import", "[/x]", "[red].csv")
    assert "reading [red].csv" in store_app.console.file.getvalue()


def test_info_beside_a_writer_that_removes_a_file(run, tmp_path, monkeypatch):
    run("put", "s", "1", "2", "--column", "v:int64")
    there = sorted((tmp_path / "s").iterdir())
    monkeypatch.setattr(type(tmp_path), "rglob", lambda self, pattern: [*there, self / "removed"])
    assert json.loads(run("info", "s", "--json")[0])["bytes_on_disk"] == sum(file.stat().st_blocks * 512 for file in there)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_number_of_8_bits_goes_out_and_in(run, tmp_path, dtype, suffix):
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    with KeyValueStore((), dtype=dtype, path=tmp_path / "a") as store, KeyValueStore((), dtype=dtype, path=tmp_path / "b"):
        store.store(torch.arange(256), values)
        store.commit()
    run("export", "a", f"f.{suffix}")
    run("import", "b", f"f.{suffix}")
    with KeyValueStore.open(tmp_path / "b") as store:
        found = store.retrieve(torch.arange(256))[0]
    nan = values.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(torch.uint8)[~nan], values.view(torch.uint8)[~nan])
    assert "expected one float8" in run("put", "b", "1", "1e6", code=1)[1]
    infinite = dtype == torch.float8_e5m2  # the others have none
    run("put", "b", "1", "Infinity", code=0 if infinite else 1)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 2), (2, 0, 3)])
def test_values_without_elements_go_out_and_in(run, shape, suffix):
    column = ("--column", "v:int16:" + ",".join(map(str, shape)))
    run("put", "a", "1", str(torch.empty(shape).tolist()), *column)
    run("export", "a", f"f.{suffix}")
    run("import", "b", f"f.{suffix}", *column)
    assert json.loads(run("get", "b", "1")[0]) == torch.empty(shape).tolist()
    assert "got shape" in run("put", "b", "1", "[[[[[]]]]]", code=1)[1]


def test_an_object_with_a_field_twice_is_refused(run, tmp_path):
    (tmp_path / "f.jsonl").write_text('{"key": 1, "v": 2}\n{"key": 2, "v": 2, "v": 3}\n')
    assert "line 2: not JSON (an object with a field twice)" in run("import", "s", "f.jsonl", "--column", "v:int64", code=1)[1]
    columns = ("--column", "v:int64", "--column", "w:int64")
    assert "expected an object" in run("put", "s", "1", '{"v": 1, "w": 2, "v": 3}', *columns, code=1)[1]


def test_lists_too_deep_for_an_object(run):
    columns = ("--column", "v:int64", "--column", "w:int64")
    assert "expected an object with v, w" in run("put", "s", "1", "[" * 50000, *columns, code=1)[1]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("key_type", "name", "content"),
    [
        ("int64", "f.jsonl", json.dumps({"key": LONG, "v": 1})),
        ("bytes", "f.jsonl", json.dumps({"key": LONG, "v": 1})),
        ("str", "f.jsonl", json.dumps({"key": "\ud800" + LONG, "v": 1})),
        ("str", "f.jsonl", json.dumps({"key": [LONG], "v": 1})),
        ("str", "f.jsonl", json.dumps({"key": "a", LONG: 1})),
        ("str", "f.jsonl", '{"key": "a", "v": 1' + "0" * 100_000 + "e1}"),
        ("str", "f.csv", f"key,{LONG}\n"),
        ("str", "f.csv", f"key,v,{LONG},{LONG}\n"),
    ],
)
def test_a_long_field_does_not_make_a_long_error(run, tmp_path, key_type, name, content):
    (tmp_path / name).write_text(content)
    assert len(run("import", "s", name, "--key-type", key_type, "--column", "v:int64", code=1)[1]) < 600


def test_a_long_option_does_not_make_a_long_error(run):
    assert "expected distinct NAME:DTYPE" in run("put", "s", "1", "1", "--column", "v:uint8:" + "9" * 5000, code=2)[1]


def test_a_long_key_of_no_text_does_not_make_a_long_error(run):
    run("put", "s", LONG, json.dumps([255]), "--key-type", "str", "--column", "v:uint8:1")
    assert len(run("export", "s", "f.csv", "--text", code=1)[1]) < 600
