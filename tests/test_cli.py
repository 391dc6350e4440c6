"""The command `memkernels`, run what a user sees of it: exit code, output, files."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from memkernels import bench
from memkernels.cli.app import app
from memkernels.cli.errors import UserError
from memkernels.cli.speed import speed_table
from memkernels.cli.trainer import Limit, Settings, Trainer
from memkernels.models import MemoryLM
from memkernels.testing import compare

SMALL = ["--window", "16", "--batch", "4", "--hidden", "16", "--embedding", "8", "--slots", "4", "--width", "4", "--threads", "1"]
TEXT = "the quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。\n" * 30


def command(*arguments):
    return [sys.executable, "-m", "memkernels", *map(str, arguments)]


@pytest.fixture
def run(capfd):
    """Runs the command line in this process: (standard output, standard error), after a check of the exit code."""
    threads = torch.get_num_threads()

    def call(*arguments, code=0):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(a) for a in arguments])
        out, error = capfd.readouterr()
        assert stop.value.code in ((0, None) if code == 0 else (code,)), (out, error)
        return out, error

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_info_says_what_is_there_and_why(run, tmp_path):
    shown, _ = run("info", "--json", tmp_path / "info.json")
    for word in ("torch", "Backends", "reference", "content_read", "why not a better one"):
        assert word in shown
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["backends"]["reference"] is None and found["versions"]["torch"].startswith(torch.__version__[:4])
    assert all(choice["backend"] and all(choice["why_not"].values()) for choice in found["ops"])


def test_verify_prints_a_table_and_a_json(run, tmp_path):
    shown, _ = run("verify", "memory_read", "--dtype", "float32", "--backend", "reference", "--json", tmp_path / "v.json")
    assert "memory_read" in shown and "allowed" in shown
    assert json.loads((tmp_path / "v.json").read_text())["rows"]
    _, error = run("verify", "dream", code=1)
    assert error.startswith("memkernels: ") and "expected one of" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--backend", "foo"], "--backend: expected one of cuda, triton, cpp, reference"),
        (["verify", "--backend", "cpp:foo"], "got 'cpp:foo'"),
        (["verify", "--dtype", "int3"], "--dtype: expected one of float64, float32, bfloat16, float16, got 'int3'"),
        (["verify", "--device", "tpu"], "--device: expected one of cpu, cuda"),
        (["bench", "--backend", "foo"], "--backend: expected one of cuda, triton, cpp, reference, got 'foo'"),
        (["bench", "--dtype", "int3"], "--dtype: expected one of"),
        (["train", "--model", "dream"], "--model: expected one of attention, memory, got 'dream'"),
        (["train", "--mode", "dream"], "--mode: expected one of content, ntm"),
        (["generate", "--checkpoint", "none", "--top-p", "0"], "--top-p: expected a number above 0 and at most 1, got 0.0"),
        (["demo", "--model", "dream"], "--model: expected one of attention, memory"),
        (["generate", "--checkpoint", "none", "--seed", 2**63], "--seed"),
        (["train", "--text", "none", "--hidden", 10**30], "--hidden"),
        (["verify", "--threads", 10**6], "--threads"),
    ],
)
def test_an_option_with_a_value_it_cannot_have(run, arguments, message):
    shown, error = run(*arguments, code=2)
    assert message in error and "Traceback" not in error and not shown
    assert error.startswith("Usage: ") or (error.startswith("memkernels: ") and error.count("\n") == 1)


def _one_line(error, message):
    assert error.startswith("memkernels: ") and message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("command", [["info"], ["verify"], ["bench"], ["train-task", "copy"]])
def test_a_bad_name_for_the_result_shows_before_the_work(run, tmp_path, command):
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        (tmp_path / "file").touch()
        begin = time.process_time()
        _one_line(run(*command, "--json", path, code=1)[1], str(path.parent if path != tmp_path else path))
        assert time.process_time() - begin < 10


def test_what_is_not_on_this_machine(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("verify", "bench"):
        _one_line(run(command, "memory_read", "--device", "cuda", code=1)[1], "torch finds no CUDA device")
    _one_line(run("verify", "memory_read", "--backend", "cuda", code=1)[1], "nothing was verified")
    _one_line(run("bench", "memory_read", "--peer", "dream", code=1)[1], "peers: expected attention, compile, eager")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried\nto"),
            "not enough memory: ",
        ),
        (MemoryError(), "not enough memory: MemoryError"),
    ],
)
def test_a_first_step_that_needs_more_memory_than_there_is(run, tmp_path, text, monkeypatch, error, message):
    out = tmp_path / "model"
    arguments = ["train", "--text", text, "--out", out, *SMALL, "--steps", 1]

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MemoryLM, "train_step", fail)
        _one_line(run(*arguments, code=1)[1], message)
        assert not out.exists()  # its sizes are not those to go on with
    run(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryLM, "train_step", fail)
        _one_line(run(*arguments[:-1], 2, code=1)[1], message)
    assert _step(out) == 1


def test_an_error_of_our_own_is_not_called_a_lack_of_memory(tmp_path, text, monkeypatch):
    monkeypatch.setattr(MemoryLM, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app(["train", "--text", str(text), "--out", str(tmp_path / "model"), *SMALL])


@pytest.mark.parametrize("task", ["copy", "mqar"])
def test_a_task_that_diverges_says_so_at_once(run, task):
    _one_line(run("train-task", task, "--rate", 1e30, "--batch", 2, "--seconds", 120, code=1)[1], "training has diverged: a loss of")


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_train_with_any_seed(run, tmp_path, text, seed):
    run("train", "--text", text, "--out", tmp_path / "model", "--seed", seed, "--steps", 1, *SMALL)


def test_verify_fails_when_an_op_is_wrong(run, monkeypatch):
    rows = compare.verify(["memory_read"], ["reference"], [torch.float32])
    good = next(row for row in rows if row.sample == "odd" and row.direction == "forward")
    bad = dataclasses.replace(good, status="fail", ratio=9.0, reason="output 0: error is 9 times the reference's")
    monkeypatch.setattr(compare, "verify", lambda *args: iter([good, bad]))
    shown, _ = run("verify", code=1)
    assert "FAIL 1" in shown and "FAIL memory_read on reference in float32, odd forward: output 0" in shown


def test_bench_goes_on_after_an_op_that_is_wrong(run, tmp_path, monkeypatch):
    known = dict(
        size="S",
        dtype="float32",
        mode="forward",
        threads=1,
        device="cpu",
        backend="cpp",
        level="avx2",
        gb_s=1.0,
        floor=0.5,
        checked="float64",
    )

    def fake(ops, **options):
        if ops == ["lstm"]:
            raise AssertionError("lstm S float32 on cpp: output 0: error 1")
        peers = (("eager", 4.0, ""), ("compile", None, "compile failed: no C++ compiler"))
        return [bench.Row(op=ops[0], peer=peer, ms=2.0, peer_ms=ms, ratio=ms and ms / 2, note=note, **known) for peer, ms, note in peers]

    monkeypatch.setattr(bench, "run", fake)
    monkeypatch.setattr(bench, "write_json", lambda path, rows: path.write_text(str(len(rows))))
    shown, error = run("bench", "memory_read", "lstm", "memory_write", "--json", tmp_path / "b.json", code=1)
    assert "memory_read" in shown and "memory_write" in shown and (tmp_path / "b.json").read_text() == "4"
    assert error == "memkernels: lstm is not measured, its result is wrong: lstm S float32 on cpp: output 0: error 1\n"
    printed = io.StringIO()
    Console(file=printed, width=140).print(speed_table(fake(["memory_read"])))
    assert "4 (2.0x)" in printed.getvalue() and "failed, see below" in printed.getvalue()


@pytest.mark.parametrize("model", ["memory", "attention"])
def test_train_resume_generate(run, tmp_path, text, model):
    out = tmp_path / "runs" / "model.safetensors"
    heads = ["--heads", "2"] if model == "attention" else []
    arguments = ["train", "--text", text, "--model", model, "--out", out, *SMALL, *heads]
    first, _ = run(*arguments, "--steps", 12)
    assert f"{model} model" in first and "held out" in first and "saved to" in first
    again, _ = run(*arguments, "--steps", 20)
    assert "resumed at step 12" in again and "step 20" in again
    assert "step 20" in run(*arguments, "--minutes", 0)[0] and "step 20" in run(*arguments, "--steps", 0)[0]
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    one, two = (run("generate", "--checkpoint", out, "--prompt", "狐 fox", "--length", 30, "--seed", 1)[0] for _ in range(2))
    assert one == two and one.startswith("狐 fox") and len(one.rstrip("\n")) >= 30


@pytest.mark.parametrize(("options", "name"), [([], "memory"), (["--model", "attention"], "attention")])
def test_train_without_a_name_for_the_checkpoint(run, tmp_path, monkeypatch, text, options, name):
    monkeypatch.chdir(tmp_path)
    shown, _ = run("train", "--text", text, *options, "--steps", 1, *SMALL)
    assert f"saved to memkernels-{name}.safetensors" in shown
    assert MemoryLM.load(f"memkernels-{name}.safetensors").config.model == name
    usage, _ = run("train", "--help")
    assert "[OPTIONS] [FILE]" in usage and "[required]" not in usage


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_diverges_keeps_the_last_good_checkpoint(run, tmp_path, text, steps):
    out = tmp_path / "model"
    arguments = ["train", "--text", text, "--out", out, "--rate", 1e30, "--save-every", 0, *SMALL]
    run(*arguments, "--steps", 0)
    before = out.read_bytes()
    _, error = run(*arguments, "--steps", steps, code=1)
    assert error.startswith("memkernels: training has diverged") and error.count("\n") == 1
    assert "smaller --rate" in error and [p.name for p in tmp_path.iterdir() if p != text] == [out.name]
    assert _step(out) == 0 and len(out.read_bytes()) == len(before)
    assert MemoryLM.load(out).generate("fox", 3, seed=0)


def test_a_first_run_that_diverges_leaves_nothing_to_go_on_from(run, tmp_path, text):
    """Else the next one, at a smaller rate, would be told that it was trained with another."""
    out = tmp_path / "model"
    error = run("train", "--text", text, "--out", out, "--rate", 1e30, "--steps", 3, *SMALL, code=1)[1]
    assert "smaller --rate" in error and "kept" not in error and not out.exists()
    run("train", "--text", text, "--out", out, "--rate", 1e-3, "--steps", 1, *SMALL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_trainer_saves_nothing_that_cannot_be_read(tmp_path, bad):
    trainer = Trainer.start(TEXT, dict(hidden=16, embedding=8, slots=4, width=4), Settings(window=16, batch=4))
    trainer.save(tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    next(trainer.run(Limit(1)))
    trainer.optimizer.state[trainer.model.dense.weight]["exp_avg"][0] = bad
    with pytest.raises(ValueError, match="holds values that are not finite"):
        trainer.save(tmp_path / "model")
    with torch.no_grad():
        trainer.model.dense.weight[0] = bad
    with pytest.raises(UserError, match="training has diverged: nan bits per character at step 1"):
        trainer.save(tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == before


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    config, settings = dict(hidden=16, embedding=8, slots=4, width=4, dropout=0.2), Settings(window=16, batch=4)

    def finish(trainer, steps):
        for _ in trainer.run(Limit(steps)):
            pass
        assert trainer.step == steps
        return trainer

    whole = finish(Trainer.start(TEXT, config, settings), 14)
    half = finish(Trainer.start(TEXT, config, settings), 7)
    half.save(tmp_path / "half")
    torch.manual_seed(99)
    resumed = finish(Trainer.resume(tmp_path / "half", TEXT, {}, {}), 14)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.evaluate() == resumed.evaluate()


def test_the_rate_rises_and_falls():
    """With the step; or with the seconds of training to a twentieth, and stays there."""
    config = dict(hidden=16, embedding=8, slots=4, width=4)
    trainer = Trainer.start(TEXT, config, Settings(window=16, rate=1.0, warmup=10))
    assert trainer.rate() == pytest.approx(0.1)
    trainer.step = 1500
    assert trainer.rate() == pytest.approx(0.5)
    timed = Trainer.start(TEXT, config, Settings(window=16, rate=1.0, warmup=10, decay_seconds=8.0))
    timed.step = 1500
    assert timed.rate() == pytest.approx(1.0)
    for seconds, rate in ((4.0, 0.525), (8.0, 0.05), (80.0, 0.05)):
        timed.seconds = seconds
        assert timed.rate() == pytest.approx(rate)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_training(run, tmp_path, text, sign):
    out = tmp_path / "model"
    arguments = ["train", "--text", text, "--out", out, *SMALL]
    process = subprocess.Popen(command(*arguments, "--steps", 1_000_000, "--save-every", 0), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and not (out.exists() and _step(out) > 3):
        time.sleep(0.1)
    process.send_signal(sign)
    stdout, stderr = process.communicate(timeout=280)
    reached = _step(out)
    assert reached > 3
    if sign == signal.SIGINT:
        assert process.returncode == 130 and b"stopped at step" in stdout and stderr == b"memkernels: stopped\n"
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert f"resumed at step {reached}" in run(*arguments, "--steps", reached + 2)[0]


def _step(path):
    return MemoryLM.load_with_extra(path)[2]["step"]


def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, text):
    empty, binary, short, foreign = (tmp_path / name for name in ("empty", "binary", "short", "foreign"))
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00hello" * 50)
    short.write_text("too short")
    foreign.write_bytes(b"something else")
    (tmp_path / "file").write_text("x")
    out = tmp_path / "out" / "model"
    cases = [
        (["train", "--text", tmp_path / "missing", "--out", out], "no such file"),
        (["train", "--text", empty, "--out", out], "has no text"),
        (["train", "--text", binary, "--out", out], "not UTF-8 text"),
        (["train", "--text", short, "--out", out], "too short"),
        (["train", "--text", tmp_path, "--out", out], "cannot be read"),
        (["train", "--text", text, "--out", out, "--model", "attention", "--heads", 3], "heads: expected a divisor"),
        (["train", "--text", text, "--out", foreign], "not a whole safetensors file"),
        (["train", "--text", text, "--out", tmp_path / "file" / "model"], "cannot be made"),
        (["train", "--out", out], "at least one file"),
        (["generate", "--checkpoint", tmp_path / "missing"], "missing"),
        (["generate", "--checkpoint", foreign], "not a whole safetensors file"),
        (["generate", "--checkpoint", tmp_path], "got a folder"),
        (["demo", "--text", tmp_path / "missing", "--out", out], "no such file"),
        (["bench", "dream"], "expected one of"),
    ]
    for arguments, message in cases:
        _, error = run(*arguments, code=1)
        assert error.startswith("memkernels: ") and message in error and error.count("\n") == 1, (arguments, error)
    assert foreign.read_bytes() == b"something else"
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(run, tmp_path, text):
    out, other = tmp_path / "model", tmp_path / "other.txt"
    run("train", "--text", text, "--out", out, "--steps", 2, *SMALL)
    before = out.read_bytes()
    other.write_text(TEXT + "x", encoding="utf-8")
    for arguments, message in (
        (["--text", other], "another text"),
        (["--text", text, "--hidden", 8], "hidden=16, not 8"),
        (["--text", text, "--model", "attention"], "model=memory, not attention"),
    ):
        _, error = run("train", "--out", out, *arguments, code=1)
        assert message in error and error.count("\n") == 1
    assert out.read_bytes() == before
    out.write_bytes(before[:-100])
    for arguments in (["train", "--text", text, "--out", out], ["generate", "--checkpoint", out]):
        assert "not a whole safetensors file" in run(*arguments, code=1)[1]
    assert out.read_bytes() == before[:-100]


def test_demo_in_short(run, tmp_path, text):
    out = tmp_path / "demo"
    shown, _ = run("demo", "--text", text, "--seconds", 2, "--out", out, "--no-verify", "--no-bench", "--threads", 1)
    assert "Bits per character" in shown and "1. What is built" in shown
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    points = report["training"]["points"]
    assert points[-1]["step"] > 0 and report["built"]["backends"]["reference"] is None
    assert MemoryLM.load(out / "model.safetensors").generate("fox", 5, seed=0)
    assert (out / "loss.png").exists() or "matplotlib" in shown


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich_one_line(package):
    block = f"import sys; sys.modules[{package!r}] = None; from memkernels.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", block, "info"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install typer rich" in done.stderr and done.stderr.count("\n") == 1
