"""What the processes of tests/test_distributed.py run: checks of ring_attention inside one group, and how groups are started."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import memkernels as mk
from memkernels.distributed import ring_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}


def spawn(checks, size, store):
    """Runs every check(rank, size) in `size` processes of one gloo group; raises what a rank raised."""
    multiprocessing.set_forkserver_preload(["ring"])  # torch is imported once, not once a process
    mp.start_processes(_child, (checks, size, str(store)), nprocs=size, start_method="forkserver")


def _child(rank, checks, size, store):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=400)  # a rank may get little of a busy machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    try:
        for check in checks:
            check(rank, size)
    except BaseException:
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def shards(dtype, queries, keys, heads=(4, 2)):
    """The whole sequence in float64, rounded to dtype first, upstream gradients of out and lse, and the sizes of the shards of each."""
    torch.manual_seed(0)
    shapes = ((2, heads[0], sum(queries), 8), (2, heads[1], sum(keys), 8), (2, heads[1], sum(keys), 6))
    whole = [torch.randn(s, dtype=torch.float64).to(dtype).double().requires_grad_() for s in shapes]
    upstream = torch.randn(2, heads[0], sum(queries), 6, dtype=torch.float64), torch.randn(2, heads[0], sum(queries), dtype=torch.float64)
    return whole, upstream, (queries, keys, keys)


def agree(rank, dtype, queries, keys, is_causal=False, scale=None, heads=(4, 2), options=None):
    """Outputs and gradients of this rank are those of one attention over the gathered sequence."""
    whole, upstream, sizes = shards(dtype, queries, keys, heads)
    out, lse = mk.attention(*whole, is_causal=is_causal, scale=scale, enable_gqa=True, return_lse=True)
    torch.autograd.backward((out, lse), upstream)
    own = [t.detach().split(s, 2)[rank].to(dtype).requires_grad_() for t, s in zip(whole, sizes, strict=True)]
    dout, dlse = (t.split(queries, 2)[rank].to(dtype) for t in upstream)
    found = ring_attention(*own, is_causal=is_causal, scale=scale, return_lse=True, **(options or {}))
    assert found[0].dtype == dtype and found[0].is_contiguous()
    torch.autograd.backward(found, (dout, dlse.to(found[1].dtype)))
    wanted = [out.split(queries, 2)[rank], lse.split(queries, 2)[rank], *(t.grad.split(s, 2)[rank] for t, s in zip(whole, sizes))]
    for got, want, name in zip((*found, *(t.grad for t in own)), wanted, ("out", "lse", "dquery", "dkey", "dvalue")):
        message = f"rank {rank} {dtype} {queries} {keys} causal={is_causal}: {name}"
        torch.testing.assert_close(
            got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda text, message=message: f"{message}: {text}"
        )


def uneven(size):
    return [7, 3, 0, 4][:size]


def check_sequences(rank, size):
    for dtype in TOLERANCE:
        for is_causal in (False, True):
            agree(rank, dtype, [5] * size, [5] * size, is_causal)
            agree(rank, dtype, uneven(size), uneven(size)[::-1], is_causal)
    agree(rank, torch.float32, [140] * size, [140] * size, True)  # more keys than a kernel takes at once
    agree(rank, torch.float64, [4] * size, [0] * (size - 1) + [6], True)  # most queries see no key at all
    agree(rank, torch.float64, [4] * size, [0] * size)
    agree(rank, torch.float64, [6] + [0] * (size - 1), [1] * size, scale=0.3, heads=(3, 3))
    agree(rank, torch.float64, [2] * size, [2] * size, True, heads=(2, 1))


def check_layouts(rank, size):
    """Strided shards, upstream gradients of any layout, some of them absent, a graph that is run twice, the same bits each time."""
    torch.manual_seed(rank)
    stored = [torch.randn(2, 5, 3, 8) for _ in range(3)]
    results = []
    for layout in ("contiguous", "B Q NH D", "B Q NH D"):
        own = [t.transpose(1, 2) if layout != "contiguous" else t.transpose(1, 2).contiguous() for t in stored]
        own = [t.requires_grad_() for t in (t.detach() for t in own)]
        out, lse = ring_attention(*own, is_causal=True, return_lse=True)
        grads = [torch.autograd.grad(loss, own, retain_graph=True) for loss in (out.sum(), lse.sum(), out.sum() + lse.sum(), out.sum())]
        for a, b, both, again in zip(*grads, strict=True):
            torch.testing.assert_close(a + b, both)
            assert torch.equal(a, again)
        results.append([out, lse, *grads[2]])
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(two, three)
    torch.testing.assert_close(torch.compile(ring_attention, backend="aot_eager")(*own, is_causal=True), results[0][0])
    with torch.no_grad():
        assert torch.equal(ring_attention(*own, is_causal=True), results[0][0]) and torch.is_tensor(ring_attention(*own))
    own = [t.detach() for t in own]
    own[rank % 3].requires_grad_()  # each rank asks for another gradient
    (gradient,) = torch.autograd.grad(ring_attention(*own, is_causal=True).sum(), own[rank % 3])
    torch.testing.assert_close(gradient, grads[0][rank % 3])
    poisoned = own[1].detach().clone()
    if rank == size - 1:
        poisoned[:, :, -1] = torch.nan  # only the last query of all sees it
    out = ring_attention(own[0].detach(), poisoned, own[2].detach(), is_causal=True)
    assert out[:, :, :-1].isfinite().all() and out[:, :, -1].isnan().all() == (rank == size - 1)


def check_groups(rank, size):
    """A group of some ranks, a group of one, forced backends, autocast, second order."""
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(size // 2)]
    agree(rank % 2, torch.float64, [3, 4], [4, 3], True, options=dict(group=pairs[rank // 2]))
    refused(ValueError, "ring_attention: group: expected a group that this process is a member of", group=pairs[1 - rank // 2])
    alone = [dist.new_group([i]) for i in range(size)]
    agree(0, torch.float64, [5], [6], True, options=dict(group=alone[rank]))
    with mk.backend("reference"):
        agree(rank, torch.float64, [3] * size, [4] * size, True)
    own = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ring_attention(*own, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in own)
    (first,) = torch.autograd.grad(ring_attention(*own).sum(), own[0], create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        assert "first order only" in str(error)
    else:
        raise AssertionError("double backward did not raise")


def refused(error, text, *tensors, **options):
    tensors = tensors or [torch.zeros(1, 2, 3, 4)] * 3
    try:
        ring_attention(*tensors, **options)
    except error as raised:
        assert text in str(raised), str(raised)
    else:
        raise AssertionError(f"not refused: {text}")


def check_errors(rank, size):
    """Every rank raises, whichever of them is wrong, and the group can be used afterwards."""
    last, plain = rank == size - 1, torch.zeros(1, 2, 3, 4)
    wrong = torch.zeros(1, 2, 3, 5) if last else plain
    refused(ValueError, "the same D on all ranks, got 4", wrong, wrong, plain)
    refused(ValueError, "the same B on all ranks, got 1", *[plain.expand(1 + last, 2, 3, 4)] * 3)
    refused(TypeError, "the same dtype on all ranks, got float32", *[plain.double() if last else plain] * 3)
    refused(ValueError, "the same is_causal on all ranks, got 0", is_causal=last)
    refused(ValueError, "the same scale on all ranks, got 1.0", scale=2.0 if last else 1.0)
    refused(ValueError, "expected a call that needs gradients on all ranks or on none", plain.clone().requires_grad_(last), plain, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=last):
        refused(TypeError, "the same dtype on all ranks, got float32")
    refused(ValueError, "ring_attention: scale: expected a finite number", scale=torch.inf)
    refused(ValueError, "ring_attention: query: expected a tensor on a device that holds data", *[plain.to("meta")] * 3)
    if last:
        refused(OverflowError, "", scale=10**400)
        refused(ValueError, "ring_attention: key: expected [B NHk K D]", plain, wrong, plain)
        refused(TypeError, "ring_attention: key: expected a tensor, got NoneType", plain, None, plain)
        refused(ValueError, "ring_attention: key: expected a divisor of 2 heads", plain, *[torch.zeros(1, 3, 3, 4)] * 2)
        refused(TypeError, "ring_attention: is_causal: expected True or False", is_causal=1)
    else:
        for _ in range(5):
            refused(RuntimeError, f"ring_attention: rank {size - 1}: expected arguments like here")
    agree(rank, torch.float64, [2] * size, [2] * size)
