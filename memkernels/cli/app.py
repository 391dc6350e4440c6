"""The commands and their options; the work is done by the modules beside this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from memkernels.cli.command import console, one_line_errors
from memkernels.cli.errors import UserError
from memkernels.cli.store_app import store_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fused memory mechanisms for PyTorch: what is built, is it right, is it fast, does it learn.",
)
app.add_typer(store_app, name="store")

Texts = Annotated[Optional[list[Path]], typer.Option("--text", help="UTF-8 text file; may be given several times.")]  # noqa: UP045 (typer on 3.10)
MoreTexts = Annotated[Optional[list[Path]], typer.Argument(metavar="FILE", help="More text files, as in --text *.txt.", show_default=False)]  # noqa: UP045
MOST = 2**31 - 1  # of a size; what is larger than memory says so when it is asked for
Threads = Annotated[Optional[int], typer.Option(min=1, max=1024, help="Threads; default: torch's own.")]  # noqa: UP045
Size = Annotated[Optional[int], typer.Option(min=1, max=MOST)]  # noqa: UP045
Seed = Annotated[Optional[int], typer.Option(min=-(2**63), max=2**63 - 1)]  # noqa: UP045
Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the result here.")]  # noqa: UP045


def _threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
@one_line_errors
def info(json_path: Json = None) -> None:
    """Versions, what is built, what is missing and why, which backend runs each op and why not a better one."""
    import json

    from memkernels.cli import info
    from memkernels.cli.files import check_output, write_text

    check_output(json_path)
    found = info.show(console)
    if json_path is not None:
        write_text(json_path, json.dumps(found, indent=1) + "\n")


@app.command()
@one_line_errors
def verify(
    ops: Annotated[Optional[list[str]], typer.Argument(help="Ops; default: all.", show_default=False)] = None,  # noqa: UP045
    backend: Annotated[Optional[list[str]], typer.Option(help='Backends, e.g. "cpp" or "cpp:avx2"; default: all.')] = None,  # noqa: UP045
    dtype: Annotated[Optional[list[str]], typer.Option(help="float64, float32, bfloat16, float16; default: all.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_path: Json = None,
    threads: Threads = None,
) -> int:
    """Every op x backend x dtype against float64 on this machine; exit code 1 if one is wrong."""
    from memkernels.cli import verify
    from memkernels.cli.errors import check_device, check_option
    from memkernels.cli.files import check_output

    check_option("--backend", backend or (), verify.backends())
    check_option("--dtype", dtype or (), verify.dtypes())
    check_device(device)
    check_output(json_path)
    _threads(threads)
    summaries = verify.run(console, ops, backend, dtype, device, json_path)
    if all(s.status == "not run" for s in summaries):
        raise UserError("nothing was verified: no backend that was asked for runs here (see above)")
    return int(any(s.status == "FAIL" for s in summaries))


@app.command()
@one_line_errors
def bench(
    ops: Annotated[Optional[list[str]], typer.Argument(help="Ops; default: all.", show_default=False)] = None,  # noqa: UP045
    json_path: Json = None,
    plot: Annotated[Optional[Path], typer.Option(help="Folder for plots.")] = None,  # noqa: UP045
    full: Annotated[bool, typer.Option("--full", help="All sizes, longer timings.")] = False,
    dtype: Annotated[list[str], typer.Option(help="Dtypes.")] = ["float32"],  # noqa: B006 (typer copies it)
    peer: Annotated[list[str], typer.Option(help='Peers, e.g. "eager", "compile".')] = ["eager", "compile"],  # noqa: B006
    backend: Annotated[Optional[str], typer.Option(help="Force a backend.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
) -> int:
    """Ops against their peers, each checked against float64 before it is timed."""
    import torch

    from memkernels import bench
    from memkernels._backends import NAMES as BACKENDS
    from memkernels.bench.environment import binding_note
    from memkernels.cli.errors import check_device, check_option
    from memkernels.cli.files import check_output, writable_folder
    from memkernels.cli.speed import measure
    from memkernels.cli.verify import dtypes

    check_option("--backend", [backend], BACKENDS)
    check_option("--dtype", dtype, dtypes())
    check_device(device)
    check_output(json_path)
    if plot is not None:
        writable_folder(plot)
    options = dict(
        quick=not full, dtypes=[getattr(torch, name) for name in dtype], peers=peer, backend=backend, device=device, threads=threads
    )
    rows, failures = measure(console, ops, **options)
    print(bench.table(rows))
    if device == "cpu" and (note := binding_note()):
        print(note)
    if json_path is not None:
        bench.write_json(json_path, rows)
    if plot is not None:
        bench.plot(rows, plot)
    for op, reason in failures.items():
        print(f"memkernels: {op} is not measured, its result is wrong: {reason}", file=sys.stderr)
    return int(bool(failures))


@app.command()
@one_line_errors
def train(
    text: Texts = None,
    more: MoreTexts = None,
    model: Annotated[Optional[str], typer.Option(help="attention or memory (default).")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Checkpoint, resumed if it is there; default: memkernels-MODEL.safetensors.")] = None,  # noqa: UP045
    minutes: Annotated[Optional[float], typer.Option(min=0, help="Minutes of training, resumed ones included.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=0, max=MOST, help="Steps, in all; default 1000 without --minutes.")] = None,  # noqa: UP045
    window: Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Steps of back-propagation.")] = None,  # noqa: UP045
    batch: Size = None,
    rate: Annotated[Optional[float], typer.Option(min=0, help="Learning rate at its highest.")] = None,  # noqa: UP045
    seed: Seed = None,
    embedding: Size = None,
    hidden: Size = None,
    heads: Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Attention heads.")] = None,  # noqa: UP045
    slots: Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Rows of the external memory.")] = None,  # noqa: UP045
    width: Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Columns of the external memory.")] = None,  # noqa: UP045
    read_heads: Size = None,
    mode: Annotated[Optional[str], typer.Option(help="Its addressing: content, ntm, dnc, topk, product or store.")] = None,  # noqa: UP045
    dropout: Annotated[Optional[float], typer.Option(min=0, max=1)] = None,  # noqa: UP045
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 30.0,
    threads: Threads = None,
) -> None:
    """Trains a character language model; the last tenth of the text is held out and scored. Stop it any time, run it again to go on."""
    from memkernels.cli import train as training
    from memkernels.cli.errors import check_option
    from memkernels.cli.texts import read_texts
    from memkernels.cli.trainer import Limit
    from memkernels.models.memory_lm import MODELS, MemoryLMConfig
    from memkernels.nn.external_memory import MODES

    check_option("--model", [model], MODELS)
    check_option("--mode", [mode], MODES)
    out = Path(f"memkernels-{model or MemoryLMConfig.model}.safetensors") if out is None else out
    files = [*(text or ()), *(more or ())]
    if not files:
        raise UserError("--text: expected at least one file")
    _threads(threads)
    sizes = dict(model=model, embedding=embedding, hidden=hidden, heads=heads, slots=slots, width=width, read_heads=read_heads)
    config = _given(sizes | dict(mode=mode, dropout=dropout))
    trainer = training.open_run(out, read_texts(files), config, _given(dict(window=window, batch=batch, rate=rate, seed=seed)))
    limit = Limit(steps if steps is not None or minutes is not None else 1000, None if minutes is None else 60 * minutes)
    resumed = f", resumed at step {trainer.step}" if trainer.step else ""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{trainer.model.config.model} model, {len(trainer.model.vocabulary)} symbols, {parameters:,} parameters{resumed}")
    try:
        points = training.train(console, trainer, limit, out, save_every, evaluate_every=10.0)
    except KeyboardInterrupt:
        print(f"stopped at step {trainer.step}, saved to {out}; run the same command to go on")
        raise
    except Exception:
        if trainer.fresh:  # a first step that fails leaves nothing to go on from, and its settings are not to be used again
            out.unlink(missing_ok=True)
        raise
    last = points[-1]
    print(f"step {last.step}: {last.train:.3f} bits per character, held out {last.held_out:.3f}; saved to {out}")


@app.command("train-task")
@one_line_errors
def train_task(
    task: Annotated[str, typer.Argument(help="copy, repeat-copy, associative-recall or mqar.")],
    model: Annotated[Optional[str], typer.Option(help="ntm (default) or dnc; of mqar attention (default) or topk.")] = None,  # noqa: UP045
    seconds: Annotated[float, typer.Option(min=0, help="The longest to train.")] = 300.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1)] = 0,
    batch: Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Sequences a step; default 16, of mqar 128.")] = None,  # noqa: UP045
    rate: Annotated[Optional[float], typer.Option(min=0, help="Learning rate; default: the task's own.")] = None,  # noqa: UP045
    threads: Threads = None,
    json_path: Json = None,
) -> int:
    """Trains a memory machine on a task of the papers and says whether it is solved. Exit code 1: not solved within the time."""
    from memkernels.cli import mqar, tasks
    from memkernels.cli.errors import check_option
    from memkernels.cli.files import check_output, write_text

    check_output(json_path)
    check_option("TASK", [task], (*tasks.TASKS, "mqar"))
    models = mqar.MODELS if task == "mqar" else tasks.MODELS
    model = models[0] if model is None else model
    check_option("--model", [model], models)
    _threads(threads)
    if task == "mqar":
        found = mqar.run(console, model, seconds, seed, batch or 128, 3e-3 if rate is None else rate)
    else:
        found = tasks.run(console, task, model, seconds, seed, batch or 16, rate)
    if json_path is not None:
        write_text(json_path, json.dumps(found, indent=1) + "\n")
    return 0 if found["solved"] else 1


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command()
@one_line_errors
def generate(
    checkpoint: Annotated[Path, typer.Option(help="What `train` wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    length: Annotated[int, typer.Option(min=0, max=MOST)] = 400,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Seed = None,
    threads: Threads = None,
) -> None:
    """Continues a prompt, one character at a time."""
    from memkernels.cli.errors import OptionError
    from memkernels.models import MemoryLM

    _threads(threads)
    if not top_p > 0:
        raise OptionError(f"--top-p: expected a number above 0 and at most 1, got {top_p}")
    text = prompt + MemoryLM.load(checkpoint).generate(prompt, length, temperature, top_p, seed)
    sys.stdout.buffer.write((text + "\n").encode("utf-8", "replace"))


@app.command()
@one_line_errors
def demo(
    text: Texts = None,
    more: MoreTexts = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of training.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder for report.json, plots and the model.")] = Path("memkernels-demo"),
    model: Annotated[str, typer.Option(help="attention or memory.")] = "memory",
    verify: Annotated[bool, typer.Option(help="Compare every op and backend with float64.")] = True,
    bench: Annotated[bool, typer.Option(help="Measure the ops.")] = True,
    threads: Threads = None,
) -> int:
    """Shows what is built, that it is right, that it learns real text, and how fast it is."""
    from memkernels.cli import demo
    from memkernels.cli.errors import check_option
    from memkernels.models.memory_lm import MODELS

    check_option("--model", [model], MODELS)
    _threads(threads)
    return demo.run(console, [*(text or ()), *(more or ())], seconds, out, model, verify, bench, threads)
