"""What the processes of tests/test_distributed.py run of ShardedMemory: reads, gradients and writes against one process with all rows."""

import torch
from torch.utils.checkpoint import checkpoint

import memkernels as mk
from memkernels.distributed import ShardedMemory

SIZES = ([4, 3, 0, 5], [1, 6, 2, 0])  # rows, and queries, of the ranks


def whole(size, dtype, with_value):
    """All rows, values, queries and strengths, the upstream gradients, and their sizes."""
    torch.manual_seed(1)
    rows, queries = (s[:size] for s in SIZES)
    key = torch.randn(sum(rows), 6, dtype=torch.float64).to(dtype).double().requires_grad_()
    value = torch.randn(sum(rows), 3, dtype=torch.float64).to(dtype).double().requires_grad_() if with_value else None
    query = torch.randn(sum(queries), 6, dtype=torch.float64).to(dtype).double().requires_grad_()
    strength = (1 + torch.rand(sum(queries), dtype=torch.float64)).to(dtype).double().requires_grad_()
    return key, value, query, strength, torch.randn(sum(queries), 3 if with_value else 6, dtype=torch.float64), rows, queries


def own(t, sizes, rank, dtype):
    return None if t is None else t.detach().split(sizes)[rank].to(dtype, copy=True).requires_grad_(t.requires_grad)


def close(got, want, dtype, what):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def check_content_read(rank, size):
    for dtype, similarity, with_value in (
        (torch.float64, "cosine", False), (torch.float64, "dot", True), (torch.float32, "l2", True), (torch.bfloat16, "cosine", True),
    ):  # fmt: skip
        key, value, query, strength, upstream, rows, queries = whole(size, dtype, with_value)
        mask = torch.arange(sum(rows)) % 3 != 1
        read = mk.content_read(
            key[None], query[None], strength[None], value=None if value is None else value[None], similarity=similarity, mask=mask[None]
        )[0]
        read.backward(upstream)
        mine = [own(t, s, rank, dtype) for t, s in ((key, rows), (value, rows), (query, queries), (strength, queries))]
        mine[0].data[~mask.split(rows)[rank]] = torch.nan  # reaches nothing
        memory = ShardedMemory(mine[0], mine[1])
        assert memory.rows == sum(rows) and memory.offset == sum(rows[:rank])
        found = memory.content_read(mine[2], mine[3], similarity=similarity, mask=mask.split(rows)[rank])
        found.backward(upstream.split(queries)[rank].to(dtype))
        what = f"rank {rank} {dtype} {similarity}"
        close(found, read.split(queries)[rank], dtype, what)
        for t, s, got, name in zip(
            (key, value, query, strength), (rows, rows, queries, queries), mine, ("key", "value", "query", "strength")
        ):
            if t is not None:
                close(got.grad, t.grad.split(s)[rank], dtype, f"{what} d{name}")


def check_topk_read(rank, size):
    for dtype, k, with_value in ((torch.float64, 3, True), (torch.float32, 2, False), (torch.float64, 20, True)):
        key, value, query, _, upstream, rows, queries = whole(size, dtype, with_value)
        with torch.no_grad():  # products without rounding, so that ties are ties whatever the shape of the product: some lie between ranks
            for t in (key, query):
                t.mul_(2).round_().div_(2)
            key[-1] = key[0]
        scores = 0.5 * query @ key.mT
        order = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
        weights = torch.softmax(scores.gather(1, order), 1)
        read = (weights[..., None] * (key if value is None else value)[order]).sum(1)
        loss = (read * upstream).sum() + (weights**2).sum()
        loss.backward()
        mine = [own(t, s, rank, dtype) for t, s in ((key, rows), (value, rows), (query, queries))]
        found, w, index = ShardedMemory(mine[0], mine[1]).topk_read(mine[2], k, scale=0.5)
        ((found * upstream.split(queries)[rank]).sum() + (w**2).sum()).backward()
        n, what = min(k, sum(rows)), f"rank {rank} {dtype} k={k}"
        assert torch.equal(index[:, :n], order.split(queries)[rank]) and (index[:, n:] == -1).all() and (w[:, n:] == 0).all(), what
        close(found, read.split(queries)[rank], dtype, what)
        close(w[:, :n], weights.split(queries)[rank], dtype, what)
        for t, s, got, name in zip((key, value, query), (rows, rows, queries), mine, ("key", "value", "query")):
            if t is not None:
                close(got.grad, t.grad.split(s)[rank], dtype, f"{what} d{name}")


def check_second_order(rank, size):
    """A second derivative raises, also where it is one part of a loss, and is not zero."""
    for with_value in (False, True):
        key, value = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True) if with_value else None
        memory, query = ShardedMemory(key, value), torch.randn(2, 4, requires_grad=True)
        for read in (memory.content_read(query, torch.ones(2)), memory.topk_read(query, 2)[0]):
            gradients = torch.autograd.grad(read.sum(), (query, key), create_graph=True)
            for gradient in gradients:
                try:
                    (gradient.square().sum() + query.sum()).backward(retain_graph=True)
                except RuntimeError as error:
                    assert "ShardedMemory: gradients: expected to be taken once" in str(error)
                else:
                    raise AssertionError("double backward did not raise")


def check_modes(rank, size):
    """Reads are those of the memory's dtype under autocast of some ranks; recomputed they are the same, and without gradients."""
    torch.manual_seed(rank)
    rows, query = torch.randn(300, 16, requires_grad=True), torch.randn(3, 16).bfloat16()

    def read(query):
        found = [memory.content_read(query, torch.ones(3)), *memory.topk_read(query, 5)]
        return found, torch.autograd.grad(found[0].sum() + found[1].sum(), rows)[0]

    memory = ShardedMemory(rows)
    wanted, gradient = read(query.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rank == 0):
        found, lower = read(query if rank == 0 else query.float())
    for a, b in zip((*found, lower), (*wanted, gradient)):
        assert a.dtype == b.dtype and torch.equal(a, b)

    def both(query):
        return memory.content_read(query, torch.ones(3)) + memory.topk_read(query, 5)[0]

    again = checkpoint(both, query.float().requires_grad_(), use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), rows), torch.autograd.grad(both(query.float()).sum(), rows)):
        assert torch.equal(a, b)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = [memory.content_read(query.float(), torch.ones(3)), *memory.topk_read(query.float(), 5)]
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, wanted))


def check_writes(rank, size):
    """Rows go to their owners; the last rank wins, or all are added up."""
    rows = SIZES[0][:size]
    memory = ShardedMemory(torch.zeros(rows[rank], 2), torch.zeros(rows[rank], 1))
    last = sum(rows) - 1
    memory.write(torch.tensor([0, last, 1, 0]), torch.full((4, 2), rank + 1.0), torch.tensor([[0.0], [0.0], [0.0], [rank + 5.0]]))
    if rank == 0:
        assert memory.key[:2].tolist() == [[size, size]] * 2 and memory.value[0] == size + 4 and memory.key[2:].count_nonzero() == 0
    memory.write(torch.tensor([2]), torch.ones(1, 2), torch.ones(1, 1), accumulate=True)
    if rank == 0:
        assert memory.key[2].tolist() == [size, size]
    if last >= sum(rows[:rank]) and last < sum(rows[: rank + 1]):
        assert memory.key[-1].tolist() == [size, size]


def check_errors(rank, size):
    """Every rank raises, whichever of them is wrong, and the memory can be used afterwards."""
    memory, last = ShardedMemory(torch.ones(2, 3)), rank == size - 1

    def refused(error, text, call):
        try:
            call()
        except error as raised:
            assert text in str(raised), str(raised)
        else:
            raise AssertionError(f"not refused: {text}")

    other = "expected arguments like here"
    wrong = (ValueError, "key: expected [R W]") if last else (RuntimeError, other)
    refused(*wrong, lambda: memory.content_read(torch.ones(1, 4 if last else 3), torch.ones(1)))
    refused(ValueError, "expected the same k on all ranks", lambda: memory.topk_read(torch.ones(1, 3), 1 + last))
    refused(
        TypeError, "expected the same dtype on all ranks", lambda: ShardedMemory(torch.ones(1, 3, dtype=torch.float64 if last else None))
    )
    refused(
        *(TypeError, "key: expected a tensor") if last else (RuntimeError, other), lambda: ShardedMemory(None if last else torch.ones(2, 3))
    )
    meta = torch.ones(2, 3, device="meta" if last else "cpu")
    refused(*(ValueError, "got device meta") if last else (RuntimeError, other), lambda: ShardedMemory(meta))
    refused(
        *(ValueError, "scale: expected a finite number") if last else (RuntimeError, other),
        lambda: memory.topk_read(torch.ones(1, 3), 1, scale=torch.nan if last else 1.0),
    )
    refused(
        *(OverflowError, "") if last else (RuntimeError, other), lambda: memory.topk_read(torch.ones(1, 3), 1, scale=10**400 if last else 1)
    )
    wrong = (IndexError, f"index: expected rows 0 to N-1={2 * size - 1}, got 2 to 99") if last else (RuntimeError, other)
    refused(*wrong, lambda: memory.write(torch.tensor([2, 99 if last else 1]), torch.zeros(2, 3)))
    assert memory.content_read(torch.ones(1, 3), torch.ones(1)).tolist() == [[1.0] * 3]
