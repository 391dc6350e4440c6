"""Runs every CUDA C++ kernel on host memory against float64 (argument: the emulated _C_cuda); prints the failures, exits 1 on any.

Runs in a process of its own, because it puts the emulated module where the real one would be.
"""

import importlib.util
import sys

import torch

import memkernels
from memkernels._registry import OPS, capture
from memkernels.testing import inputs as make
from memkernels.testing.compare import error, floor, judge
from memkernels.testing.spec import Sample, specs

NAMES = ("lstm_gates", "memory_write")
LAYOUTS = ("contiguous", "transposed", "outer_slice", "expanded", "misaligned", "odd_strides")
CANARY = 31337.0
# Sizes at which packs, several blocks a row, several splits and both levels of the sum tree are taken.
LARGE = {
    "lstm_gates": (Sample("packs", dict(B=5, H=64)), Sample("rows", dict(B=600, H=8), present=("peephole",))),
    "memory_write": (
        Sample("packs", dict(B=2, N=70, W=64, H=2)),
        Sample("wide", dict(B=1, N=3, W=1160, H=1)),
        Sample("tree", dict(B=2, N=2200, W=4, H=3)),
    ),
}


def load(path):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory, scratch included, is NaN
    found = importlib.util.spec_from_file_location("memkernels._C_cuda", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    sys.modules["memkernels._C_cuda"] = memkernels._C_cuda = module
    return module


def guarded(like):
    """NaN of this shape between canaries, and the whole buffer."""
    pad = 64
    buffer = torch.full((like.numel() + 2 * pad,), CANARY, dtype=like.dtype)
    inside = buffer[pad : pad + like.numel()].view(like.shape)
    inside.fill_(float("nan"))
    return inside, buffer


def intact(like, buffer):
    return bool((buffer[:64] == CANARY).all() and (buffer[64 + like.numel() :] == CANARY).all())


def flat(spec, inputs, options):
    return capture(lambda *a, **k: spec.call(spec.function, *a, **k), dict(inputs), dict(options))[1]


def run(kernels, op, args, upstream):
    """Outputs and gradients of the kernels, allocated as the registry does, between canaries."""
    outputs = [guarded(t) for t in op.allocate(*args)]
    kernels.forward(*(t for t, _ in outputs), *args)
    saved = [t for (t, _), out in zip(outputs, op.outputs) if out.save]
    inputs = args[: len(op.inputs)]
    gradients = [None if t is None else guarded(t.contiguous()) for t in inputs]
    kernels.backward(*(None if g is None else g[0] for g in gradients), *upstream, *inputs, *saved, *args[len(op.inputs) :])
    everything = [*outputs, *(g for g in gradients if g is not None)]
    return [t for t, _ in everything], all(intact(t, buffer) for t, buffer in everything)


def reference(op, args, upstream, dtype):
    args = [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    upstream = [None if t is None else t.to(dtype) for t in upstream]
    outputs = op.reference.forward(*args)
    saved = [t for t, out in zip(outputs, op.outputs) if out.save]
    gradients = op.reference.backward(*upstream, *args[: len(op.inputs)], *saved, *args[len(op.inputs) :])
    return [*outputs, *(g for g in gradients if g is not None)]


def cases(name):
    spec = specs()[name]
    for sample in (*spec.samples, *LARGE[name]):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for layout in LAYOUTS if sample in spec.samples[:3] else LAYOUTS[:1]:
                yield spec, sample, dtype, layout


def check(name, kernels):
    failures, count = [], 0
    for spec, sample, dtype, layout in cases(name):
        op = OPS[name]
        inputs = make.laid_out(make.draw(spec, sample, dtype), layout)
        args = flat(spec, inputs, sample.options)
        full = [
            make.upstream([t.requires_grad_()], dtype, "contiguous", i)[0]
            for i, (t, out) in enumerate(zip(op.allocate(*args), op.outputs))
            if out.differentiable
        ]
        for upstream in (full, [*full[:-1], None]) if len(full) > 1 else (full,):
            where = f"{name} {sample.name} {dtype} {layout} {[t is not None for t in upstream]}"
            got, clean = run(kernels, op, args, upstream)
            count += 1
            if not clean:
                failures.append(f"{where}: wrote outside its output")
            both = zip(got, reference(op, args, upstream, dtype), reference(op, args, upstream, torch.float64), strict=True)
            for index, (g, p, t) in enumerate(both):
                limit = spec.tol[index >= len(op.outputs)]
                found = judge(f"tensor {index}", error(g, t), floor(t, g.dtype), error(p, t), limit)
                if found["status"] != "ok":
                    failures.append(f"{where}: {found['reason']}")
    return failures, count


def main(path):
    load(path)
    from memkernels.backends.cuda import lstm_gates, memory_write

    failures, count = [], 0
    for name, kernels in zip(NAMES, (lstm_gates, memory_write)):
        found, n = check(name, kernels)
        failures, count = failures + found, count + n
    import store

    found, n = store.check()
    failures, count = failures + found, count + n
    print(f"{count} cases, {len(failures)} failures", *failures[:40], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
