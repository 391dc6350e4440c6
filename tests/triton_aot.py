"""Compiles Triton kernels without a GPU: reads lines MODULE:NAME:SM and answers each with what the kernel uses, a line of JSON."""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memkernels.backends.triton._common import OPTIONS

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a program may have on an A100, H100/H200, B200
# Bytes of stack that ptxas of CUDA 12.8, which Triton 3.6 and 3.7 bring, may use: it parks more values than that of 12.9 (docs/gpu.md).
OLD_PTXAS_STACK = 136 if tuple(map(int, triton.knobs.nvidia.ptxas.version.split("."))) <= (12, 8) else 0
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MARKS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma",
    "cp.async": r"cp\.async\.(cg|ca)|cp\.async\.bulk",
    "tma": r"cp\.async\.bulk\.tensor",
    "warp_specialize": r"setmaxnreg",
}


def compile_entry(entry, capability):
    names = entry.kernel.arg_names
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a in entry.divisible}
    source = ASTSource(fn=entry.kernel, signature=dict(entry.signature), constexprs=dict(entry.constants), attrs=attributes)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin):
    """(registers, bytes of stack) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", text)), max(int(n) for n in re.findall(r"STACK:(\d+)", text))


def narrow_offsets(ttir):
    """Pointer additions whose offset is not int64."""
    lines = [line for line in ttir.splitlines() if "tt.addptr" in line]
    assert lines
    return [line.strip() for line in lines if not re.search(r", (tensor<[\dx]*xi64|i64)[^,]*$", re.sub(r" loc\(.*", "", line))]


def report(module, name, capability):
    entry = next(e for e in importlib.import_module(f"memkernels.backends.triton.{module}").AOT if e.name == name)
    made = compile_entry(entry, capability)
    registers, stack = resources(made.asm["cubin"])
    found = [mark for mark, pattern in MARKS.items() if re.search(pattern, made.asm["ptx"])]
    return {
        "kernel": name,
        "sm": capability,
        "registers": registers,
        "stack": stack,
        "stack_limit": max(entry.stack, OLD_PTXAS_STACK),
        "shared": made.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "found": found,
        "expect": list(entry.expect) if capability == max(90, min(entry.capabilities)) else [],
        "contracted": bool(re.search(r"\s(mul|add|sub)\.f32\s", made.asm["ptx"])),  # what ptxas may fuse, as nothing forbids it
        "narrow_offsets": narrow_offsets(made.asm["ttir"]),
    }


if __name__ == "__main__":
    for request in sys.stdin:
        module, name, capability = request.strip().split(":")
        print(json.dumps(report(module, name, int(capability))), flush=True)
