"""attention_varlen beyond its spec: each sequence has the bits that attention gives it alone; long sequences; bad values."""

from itertools import pairwise

import checks
import pytest
import torch

import memkernels as mk

pytestmark = pytest.mark.skipif(mk.backends()["cpp"] is not None, reason="compares C++ kernels")


def call(q_lengths, k_lengths, heads=2, key_heads=1, width=32, value_width=24, dtype=torch.float32, spare=3, **options):
    """(inputs, outputs and gradients) of one call; `spare` tokens are in no sequence."""
    torch.manual_seed(len(q_lengths))
    cuts = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths)]
    shapes = ((cuts[0], heads, width), (cuts[1], key_heads, width), (cuts[1], key_heads, value_width))
    tensors = [torch.randn(int(c[-1]) + spare, h, w).to(dtype).requires_grad_() for c, h, w in shapes]
    out, lse = mk.attention_varlen(*tensors, *cuts, return_lse=True, **options)
    douts = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    gradients = torch.autograd.grad((out, lse), tensors, douts)
    return tensors, cuts, douts, (out, lse, *gradients)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(is_causal=True, causal="top-left"), dict(window=(40, 7))])
def test_each_sequence_has_the_bits_it_has_alone(level, dtype, options):
    from memkernels._C import supported_levels

    if level not in supported_levels():
        pytest.skip(f"no {level} here")
    before = mk.cpu_level()
    mk.cpu_level(level)
    try:
        one_by_one(dtype, options, [5, 0, 130, 1, 300, 7], [9, 4, 170, 0, 290, 150])
    finally:
        mk.cpu_level(before)


def one_by_one(dtype, options, q_lengths, k_lengths):
    tensors, cuts, douts, found = call(q_lengths, k_lengths, dtype=dtype, **options)
    corner = {"causal": "bottom-right", **options}
    for (q, q_end), (k, k_end) in zip(*(pairwise(c.tolist()) for c in cuts)):
        places = slice(q, q_end), slice(k, k_end), slice(k, k_end)
        parts = [t.detach()[p].transpose(0, 1)[None].requires_grad_() for t, p in zip(tensors, places)]
        out, lse = mk.attention(*parts, enable_gqa=True, return_lse=True, **corner)
        given = [d[q:q_end].transpose(0, 1)[None] for d in douts]
        alone = (out, lse, *torch.autograd.grad((out, lse), parts, given))
        for name, a, b, place in zip(("out", "lse", "dq", "dk", "dv"), found, alone, (places[0], places[0], *places)):
            assert checks.same_bits(a[place], b[0].transpose(0, 1)), f"{name} of the sequence at {q}"
    for t, c in zip(found, (cuts[0], cuts[0], cuts[0], cuts[1], cuts[1])):
        spare = t[int(c[-1]) :]
        assert (spare == (-torch.inf if t is found[1] else 0)).all()


def test_keys_split_for_few_queries_and_one_long_sequence():
    one_by_one(torch.float32, dict(is_causal=True), [3, 20, 40], [9000, 8200, 50])
    one_by_one(torch.float32, {}, [900], [700])


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_that_nobody_wants_change_no_bit(trained):
    tensors, cuts, douts, found = call([70, 9000 // 300, 2], [150, 8300, 1], key_heads=2)
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    out, lse = mk.attention_varlen(*leaves, *cuts, return_lse=True)
    for i, gradient in zip(trained, torch.autograd.grad((out, lse), [leaves[i] for i in trained], douts)):
        assert checks.same_bits(gradient, found[2 + i])


def test_the_number_of_threads_changes_no_bit():
    runs = []
    for n in (1, 2, 5):
        with checks.threads(n):
            runs.append(call([200, 3, 0, 90], [210, 8200, 5, 90], is_causal=True)[3])
    for run in runs[1:]:
        assert all(checks.same_bits(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bad", range(4))
def test_a_poisoned_sequence_leaves_the_others_alone(backend, bad):
    """Outputs and gradients to the last bit; `bad`: query, key, value, or the gradient that arrives."""
    generator, starts = torch.Generator().manual_seed(0), torch.tensor([0, 4, 9])
    tensors = [torch.randn(9, 2, 5, generator=generator) for _ in range(4)]

    def run(*given):
        leaves = [t.clone().requires_grad_() for t in given[:3]]
        with mk.backend(backend):
            out = mk.attention_varlen(*leaves, starts, starts, is_causal=True)
            return [t[:4] for t in (out, *torch.autograd.grad(out, leaves, given[3]))]

    clean = run(*tensors)
    tensors[bad][6, 1, 2] = torch.nan
    assert all(checks.same_bits(a, b) for a, b in zip(run(*tensors), clean))


@pytest.mark.parametrize("starts", [[0, 5, 3], [0, 2, 7], [1, 2, 3], [0, -2, 3]])
def test_the_kernel_checks_values_that_python_may_not_look_at(starts):
    x, ends = torch.randn(6, 1, 2), torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="attention_varlen: cu_seqlens_k: expected values that do not decrease"):
        torch.ops.memkernels.attention_varlen(x, x, x, ends, torch.tensor(starts), 1.0, 0.0, -1, -1, "top-left")


def test_int32_starts_and_a_compiled_call():
    x = torch.randn(7, 2, 4)
    starts = torch.tensor([0, 2, 6])
    wanted = mk.attention_varlen(x, x, x, starts, starts, is_causal=True)
    assert torch.equal(mk.attention_varlen(x, x, x, starts.int(), starts.int(), is_causal=True), wanted)
    compiled = torch.compile(mk.attention_varlen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x, x, starts.int(), starts.int(), is_causal=True), wanted)
