"""What runs in a process of its own: fork after use by many threads, DataLoader workers, memory that must not grow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from cases import Case, select

from memkernels.testing import compare, inputs

# Their backward adds up or fills with torch's own ops, whose parallel loops hang in a forked child.
OF_TORCHS_LOOPS = ("dnc_sequence", "hopfield_retrieve")
# Benchmark sizes whose inputs alone take seconds to draw: large enough for a parallel region with less memory.
SMALLER = {
    "paged_attention": {"B": 2, "P": 512},
    "quantized_attention": {"K": 8192},
    "retrieval_attention": {"N": 4096},
    "topk_read": {"N": 16_384},
    "weighted_bag": {"K": 8192},
}


def busy_cases() -> list[Case]:
    """The smallest benchmark size of every op on the fastest backend, or less: large enough for a parallel region."""
    found = []
    for parameter in select(dtypes=(torch.float32,), first=1, kernels_only=True):
        case = parameter.values[0]
        if case.device == "cpu" and case.spec.name not in OF_TORCHS_LOOPS:
            sample = min(case.spec.bench, key=lambda s: case.spec.bytes(s.dims, 4))
            found.append(Case(case.spec, case.backend, case.dtype, sample).with_dims(**SMALLER.get(case.spec.name, {})))
    return found


def check_fork(cases: list[Case], limit: float = 240) -> None:
    """A child forked after many threads ran finishes every op, forward and backward, with the same bits.

    The child calls nothing else of torch: torch's own parallel loops hang there.
    """
    torch.set_num_threads(2)
    given = [case.inputs() for case in cases]
    wanted = [{n: t.numpy() for n, t in case.evaluate(g).items()} for case, g in zip(cases, given)]
    upstream = [_upstream(case, g) for case, g in zip(cases, given)]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for case, g, w, u in zip(cases, given, wanted, upstream):
                found = _evaluate(case, g, u)
                for name, t in found.items():
                    assert np.array_equal(t.numpy(), w[name], equal_nan=True), f"{case}: {name} differs in the child"
            status = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
        os._exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child of a fork still ran after {limit} s")


def _upstream(case, given):
    leaves = {n: t.detach().requires_grad_() if n in case.differentiable(given) else t for n, t in given.items()}
    return inputs.upstream(case.call(leaves), case.dtype)


def _evaluate(case, given, upstream):
    with compare.using(case.backend):
        return compare.evaluate(case.spec, given, case.options, lambda outputs: upstream)


class Calls(torch.utils.data.Dataset):
    """Item i is the sum of the first output of the i-th op."""

    def __init__(self, cases: list[Case]):
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> torch.Tensor:
        case = self.cases[i]
        return case.evaluate(case.inputs())["output 0"].double().sum()


def check_dataloader(cases: list[Case]) -> None:
    """Workers of a DataLoader, forked after the parent used its threads, give what the parent gives."""
    torch.set_num_threads(2)
    wanted = [Calls(cases)[i] for i in range(len(cases))]
    loader = torch.utils.data.DataLoader(Calls(cases), batch_size=None, num_workers=2, timeout=240)
    for case, found, right in zip(cases, loader, wanted):
        assert torch.allclose(found, right), f"{case}: {found} in a worker, {right} in the parent"


def resident() -> int:
    """Bytes of this process's own memory, page by page: the sums in statm are off by what each core has yet to add, and count the pages of
    libraries, which come and go."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def check_memory(cases: list[Case], calls: int, allowed: int) -> None:
    """Memory after `calls` more forward and backward calls. A heap may grow until it found its size: a leak grows every time."""
    for case in cases:
        given = case.inputs()
        for _ in range(100):
            case.evaluate(given)
        found = [resident()]
        while len(found) < 4 and (len(found) == 1 or found[-1] - found[-2] > allowed):
            for _ in range(calls):
                case.evaluate(given)
            found.append(resident())
        assert found[-1] - found[-2] <= allowed, f"{case}: bytes after each {calls} calls: {found}"


def typical_cases(levels: str = "best") -> list[Case]:
    return [p.values[0] for p in select(levels=levels, dtypes=(torch.float32,), first=1) if p.values[0].device == "cpu"]
