"""Large CPU outputs that are gone leave their memory to later ones (csrc/common/block_pool.h)."""

import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from processes import resident

import memkernels as mk
from memkernels import _config

pytestmark = pytest.mark.skipif(isinstance(mk.backends()["cpp"], str), reason="no extension")
ROWS, WIDTH = 65_536, 160  # 40 MB of float32
LINUX = sys.platform.startswith("linux")


@pytest.fixture(autouse=True)
def kept_memory(fresh_memory_is_nan):
    """Nothing kept before and after; and as users run: deterministic torch would fill and so allocate every output itself."""
    torch.use_deterministic_algorithms(False)
    mk.empty_cache()
    yield
    mk.empty_cache()


def large(rows=ROWS, fill=None):
    """An output of the size of its memory: `memory_write` with weights of zero."""
    memory = torch.zeros(1, rows, WIDTH)
    written = mk.memory_write(memory, torch.zeros(1, 1, rows), torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, WIDTH))
    return written if fill is None else written.fill_(fill)


@pytest.mark.skipif(not LINUX, reason="kept on Linux only")
def test_memory_is_used_again():
    first = large()
    address = first.data_ptr()
    alive = large()
    assert alive.data_ptr() != address
    view = first[0, :5]
    del first
    assert large().data_ptr() != address  # the view still needs it
    del view
    assert large(ROWS - 10).data_ptr() == address  # hardly smaller
    assert large(ROWS - 20_000).data_ptr() != address
    assert large().data_ptr() == address


def test_small_outputs_are_torchs_own():
    assert mk.memory_read(torch.rand(1, 8, 4), torch.rand(1, 1, 8)).untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_do_not_see_what_was_there(dtype):
    """Rows that nobody names get a gradient of exactly 0, in recycled memory too."""
    rows = (48 << 20) // (64 * dtype.itemsize)
    index = torch.randint(rows, (64, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        table = torch.ones(rows, 64, dtype=dtype, requires_grad=True)
        mk.weighted_bag(table, index, torch.ones(64, 8, dtype=dtype)).sum().backward()
        found.append(table.grad.clone())
        table.grad.fill_(float("nan"))
        del table
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0].sum(1) != 0, torch.zeros(rows, dtype=torch.bool).index_fill(0, index.flatten(), True))


def test_retrieved_gradients_do_not_see_what_was_there():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 4, 64, generator=generator) for _ in range(3))
    memory = torch.randn(2, 1, 1, 160_000, 64, generator=generator)
    index = torch.randint(160_000, (1, 1, 4, 3), generator=generator)
    found = []
    for _ in range(2):
        keys, values = memory[0].clone().requires_grad_(), memory[1].clone().requires_grad_()
        mk.retrieval_attention(query, key, value, keys, values, index).sum().backward()
        found.append((keys.grad.clone(), values.grad.clone()))
        keys.grad.fill_(float("nan")), values.grad.fill_(float("inf"))
        del keys, values
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert (found[1][0].abs().sum(-1) != 0).sum() <= 12


def test_tensors_are_as_torchs():
    written = large(fill=3.0)
    assert written.is_contiguous() and not written.requires_grad and written.untyped_storage().nbytes() == 4 * ROWS * WIDTH
    assert torch.equal(pickle.loads(pickle.dumps(written[:, :3].clone())), written[:, :3])
    assert written.numpy()[0, 0, 0] == 3.0
    kept = written.share_memory_()
    assert kept.is_shared() and float(kept[0, -1, -1]) == 3.0
    with torch.inference_mode():
        assert large().is_inference()
    assert not large().is_inference()
    grown = large(fill=2.0)
    grown.resize_(1, 4, WIDTH)
    assert torch.equal(grown, torch.full((1, 4, WIDTH), 2.0))


def test_deterministic_torch_allocates_and_fills():
    torch.use_deterministic_algorithms(True)
    try:
        assert large().untyped_storage().resizable()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not LINUX, reason="kept on Linux only")
def test_empty_cache_gives_memory_back():
    large(fill=1.0)
    before = resident()
    mk.empty_cache()
    assert before - resident() > 35 << 20


def test_threads_take_and_give_back():
    failures = []

    def work(number):
        for i in range(6):
            mine = large(ROWS + 64 * number, fill=float(number))
            if not bool((mine == number).all()):
                failures.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_child_of_fork():
    mine = large(fill=7.0)
    child = os.fork()
    if child == 0:
        ok = float(mine[0, 0, 0]) == 7.0
        del mine
        again = large(fill=8.0)
        os._exit(0 if ok and float(again[0, -1, -1]) == 8.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((mine == 7.0).all())


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


AGAIN = f"""
import torch, memkernels as mk
def large():
    return mk.memory_write(torch.zeros(1, {ROWS}, {WIDTH}), *(torch.zeros(1, 1, n) for n in ({ROWS}, {WIDTH}, {WIDTH})))
print(large().untyped_storage().resizable())
"""


def test_limit_of_the_environment():
    assert run(AGAIN, MEMKERNELS_KEEP_MB="0").stdout.strip() == "True"
    if LINUX:
        assert run(AGAIN, MEMKERNELS_KEEP_MB="100").stdout.strip() == "False"
    wrong = run(AGAIN, MEMKERNELS_KEEP_MB="much")
    assert "MEMKERNELS_KEEP_MB: expected a whole number of megabytes, 0 or more, got 'much'" in wrong.stderr


@pytest.mark.skipif(not LINUX, reason="control groups are Linux's")
@pytest.mark.parametrize("text, kept", [("1600\n", 100), ("max\n", None), (str(2**63), "machine"), (None, None)])
def test_limit_of_a_container(tmp_path, monkeypatch, text, kept):
    """A container's memory counts, not that of the machine around it."""
    file = tmp_path / "memory.max"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(_config, "CONTAINER_LIMITS", (tmp_path / "missing", file))
    monkeypatch.delenv("MEMKERNELS_KEEP_MB", raising=False)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    assert _config.kept_memory() == (machine if kept == "machine" else kept)
