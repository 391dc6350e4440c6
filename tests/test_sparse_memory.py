"""A memory written in place, against the same steps on copies that plain autograd differentiates."""

import weakref

import pytest
import torch

import memkernels as mk

B, N, W, H, J, C = 2, 7, 3, 2, 3, 1


def drawn(steps, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()

    def places(*shape):
        return torch.randint(0, N, shape, generator=g)  # with repetitions, within a head and across

    return normal(B, N, W), [
        dict(
            write=(places(B, H, J), normal(B, H, J), normal(B, H, W)),
            clear=places(B, C),
            read=(normal(B, H, W), normal(B, H), places(B, H, J)),
        )
        for _ in range(steps)
    ]


def in_place(rows, steps, memory=None):
    memory = mk.SparseMemory(rows) if memory is None else memory
    reads = []
    for step in steps:
        mk.sparse_write(memory, *step["write"], clear=step["clear"])
        reads.append(mk.sparse_read(memory, *step["read"]))
    return memory, reads


def on_copies(rows, steps):
    """The formulas, one batch entry after the other."""
    reads = []
    for step in steps:
        index, weights, add = step["write"]
        kept = torch.ones(B, N, dtype=torch.float64).scatter(1, step["clear"], 0.0)
        rows = rows * kept[..., None]
        for b in range(B):
            for h in range(H):
                for j in range(J):
                    one = torch.zeros(B, N, dtype=torch.float64)
                    one[b, index[b, h, j]] = 1.0
                    rows = rows + one[..., None] * (weights[b, h, j] * add[b, h])
        query, strength, at = step["read"]
        found = torch.stack([rows[b][at[b]] for b in range(B)])
        norms = ((query**2).sum(-1) + 1e-6).sqrt()[..., None] * ((found**2).sum(-1) + 1e-6).sqrt()
        attended = torch.softmax(strength[..., None] * torch.einsum("bhjw,bhw->bhj", found, query) / norms, -1)
        reads.append((torch.einsum("bhj,bhjw->bhw", attended, found), attended))
    return rows, reads


def leaves_of(rows, steps):
    return [rows, *(t for step in steps for t in (*step["write"][1:], *step["read"][:2]))]


def loss_of(reads, seed=3):
    g = torch.Generator().manual_seed(seed)
    return sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for pair in reads for t in pair)


@pytest.mark.parametrize("read_until", (5, 3, 1))
def test_values_and_gradients_are_those_of_copies(read_until):
    """Also where the loss sees only the first reads, so that later writes take no part in backward."""
    rows, steps = drawn(5)
    memory, reads = in_place(rows, steps)
    last, wanted = on_copies(rows, steps)
    torch.testing.assert_close(memory.rows, last.detach())
    for found, right in zip(reads, wanted):
        torch.testing.assert_close(found, right)
    leaves = leaves_of(rows, steps)
    found = torch.autograd.grad(loss_of(reads[:read_until]), leaves, allow_unused=True)
    right = torch.autograd.grad(loss_of(wanted[:read_until]), leaves, allow_unused=True)
    for leaf, a, b in zip(leaves, found, right):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_backward_undoes_and_detach_brings_back():
    rows, steps = drawn(4)
    before = rows.detach().clone()
    memory, reads = in_place(rows, steps)
    last = memory.rows.clone()
    loss_of(reads).backward()
    assert torch.equal(memory.rows, before) and torch.equal(rows.detach(), before)
    assert torch.equal(memory.detach_().rows, last)
    more = drawn(2, seed=1)[1]
    _, reads = in_place(None, more, memory)
    leaves = leaves_of(rows, more)[1:]
    found = torch.autograd.grad(loss_of(reads), leaves)
    for a, b in zip(found, torch.autograd.grad(loss_of(on_copies(last, more)[1]), leaves)):
        torch.testing.assert_close(a, b)


def test_a_look_without_gradients_keeps_the_history():
    rows, steps = drawn(3)
    memory = mk.SparseMemory(rows)
    reads = []
    for step in steps:
        mk.sparse_write(memory, *step["write"], clear=step["clear"])
        with torch.no_grad():
            looked = mk.sparse_read(memory, *step["read"])
        reads.append(mk.sparse_read(memory, *step["read"]))
        assert not looked[0].requires_grad and torch.equal(looked[0], reads[-1][0])
    leaves = leaves_of(rows, steps)
    found = torch.autograd.grad(loss_of(reads), leaves)
    for a, b in zip(found, torch.autograd.grad(loss_of(on_copies(rows, steps)[1]), leaves)):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_is_said():
    rows, steps = drawn(2)
    memory, reads = in_place(rows, steps)
    loss = loss_of(reads)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"sparse_write: memory: .* detach_\(\)"):
        mk.sparse_write(memory, *steps[0]["write"])
    memory, reads = in_place(rows, steps)
    with torch.no_grad():
        in_place(rows, steps[:1], memory)
    with pytest.raises(RuntimeError, match="no_grad"):
        loss_of(reads).backward()


def test_arguments():
    rows, steps = drawn(1)
    memory, before = mk.SparseMemory(rows), rows.detach().clone()
    index, weights, add = steps[0]["write"]
    for error, call in (
        (IndexError, lambda: mk.sparse_write(memory, index + N, weights, add)),
        (IndexError, lambda: mk.sparse_write(memory, index, weights, add, clear=torch.full((B, 1), -1))),
        (ValueError, lambda: mk.sparse_write(memory, index, weights[:, :, :2], add)),
        (ValueError, lambda: mk.sparse_write(memory, index, weights, add[..., :2])),
        (ValueError, lambda: mk.sparse_write(memory, index, weights.float(), add.float())),
        (TypeError, lambda: mk.sparse_write(memory, index.int(), weights, add)),
        (TypeError, lambda: mk.sparse_write(rows, index, weights, add)),
        (IndexError, lambda: mk.sparse_read(memory, add, weights[..., 0], index - 1 - N)),
        (ValueError, lambda: mk.sparse_read(memory, add[:1], weights[:1, :, 0], index[:1])),
        (TypeError, lambda: mk.sparse_write(memory, 3, weights, add)),
        (ValueError, lambda: memory.least_accessed(N + 1)),
        (TypeError, lambda: memory.least_accessed("two")),
        (IndexError, lambda: memory.access(torch.full((B, 1), N))),
        (ValueError, lambda: memory.access(torch.zeros(B, dtype=torch.int64))),
        (ValueError, lambda: mk.SparseMemory(rows[0])),
        (TypeError, lambda: mk.SparseMemory(rows.half())),
    ):
        with pytest.raises(error, match=r"sparse_(write|read)|SparseMemory"):
            call()
    assert torch.equal(memory.rows, before)


def test_least_accessed():
    memory = mk.SparseMemory(torch.zeros(2, 4, 1))
    assert memory.least_accessed().tolist() == [[0], [0]]
    memory.access(torch.tensor([[0, 2], [1, 1]]))
    assert memory.least_accessed(3).tolist() == [[1, 3, 0], [0, 2, 3]]
    memory.access(torch.tensor([[1], [0]]))
    assert memory.least_accessed(4).tolist() == [[3, 0, 2, 1], [2, 3, 1, 0]]


def test_a_step_saves_its_rows_alone():
    """What is kept grows by the rows a step touches, however many there are."""
    memory = mk.SparseMemory(torch.zeros(1, 200_000, 8))
    weights = torch.ones(1, 1, 4, requires_grad=True)
    word = torch.ones(1, 1, 8)
    for t in range(100):
        mk.sparse_write(memory, torch.arange(t, t + 4).view(1, 1, 4), weights, word)
    kept = sum(e.rows.numel() for e in memory._history.log)
    assert kept == 100 * 4 * 8
    read, _ = mk.sparse_read(memory, word, torch.ones(1, 1), torch.tensor([[[50]]]))
    read.sum().backward()
    assert torch.equal(weights.grad, torch.full((1, 1, 4), 8.0)), "each of the four places wrote into row 50 once"


@pytest.mark.parametrize("backward", [False, True])
def test_a_memory_that_is_dropped_gives_back_its_rows_at_once(backward):
    """No circle through the graph: the garbage collector cannot see one, and each call would lose a whole memory."""
    rows, steps = drawn(3)
    memory, reads = in_place(rows, steps)
    if backward:
        sum(read.sum() for read, _ in reads).backward()
    gone = weakref.ref(memory.rows), weakref.ref(memory)
    del memory, reads
    assert [ref() for ref in gone] == [None, None]


def test_not_under_a_transform():
    sam = mk.nn.SAM(3, 4, 2, slots=6, width=3)
    parameters = {name: p.detach() for name, p in sam.named_parameters()}
    with pytest.raises(RuntimeError, match=r"SparseMemory: expected a call outside torch\.func transforms"):
        torch.func.grad(lambda p: torch.func.functional_call(sam, p, (torch.randn(1, 2, 3),))[0].sum())(parameters)
