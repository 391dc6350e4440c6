"""Merged parts train exactly as one attention to all keys does."""

import pytest
import torch

import memkernels as mk

PARTS = (slice(0, 3), slice(3, 4), slice(4, 11))


def parts_of(query, key, value, mask):
    return [mk.attention(query, key[:, :, k], value[:, :, k], mask[..., k], return_lse=True) for k in PARTS]


def inputs(dtype=torch.float64, queries=5):
    torch.manual_seed(0)
    shapes = ((2, 3, queries, 4), (2, 3, 11, 4), (2, 3, 11, 6))
    tensors = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    mask = torch.rand(2, 3, queries, 11) < 0.7
    mask[..., 0, :3] = False  # a query that sees nothing of the first part,
    mask[..., 1, :] = False  # and one that sees nothing at all
    return tensors, mask


@pytest.mark.parametrize("merge", ["once", "twice"])
def test_gradients_of_one_attention(merge):
    tensors, mask = inputs()
    results = []
    for whole in (True, False):
        if whole:
            out, lse = mk.attention(*tensors, mask, return_lse=True)
        elif merge == "once":
            out, lse = mk.merge_attention(*zip(*parts_of(*tensors, mask), strict=True))
        else:
            first, *others = parts_of(*tensors, mask)
            out, lse = mk.merge_attention(*zip(first, mk.merge_attention(*zip(*others, strict=True)), strict=True))
        torch.manual_seed(1)
        upstream = [torch.randn_like(out), torch.randn_like(lse)]
        first = torch.autograd.grad([out, lse], tensors, upstream, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), tensors)
        results.append([out, lse, *first, *second])
    for one, merged in zip(*results, strict=True):
        torch.testing.assert_close(merged, one, rtol=1e-9, atol=1e-11)


def test_parts_in_bfloat16():
    tensors, mask = inputs(torch.bfloat16)
    out, lse = mk.merge_attention(*zip(*parts_of(*tensors, mask), strict=True))
    wanted, wanted_lse = mk.attention(*(t.double() for t in tensors), mask, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=0.02)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_a_part_that_nobody_saw_reaches_nothing():
    """NaN and infinity in a part of weight 0, in any dtype; gradients to it are exactly 0, an infinite upstream gradient too."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        torch.manual_seed(0)
        outs, lses = torch.randn(3, 1, 2, 4, 5).to(dtype), torch.randn(3, 1, 2, 4, dtype=wide)
        outs[1, ..., 0, :], outs[1, ..., 1, :], lses[1, ..., :2] = torch.nan, torch.inf, -torch.inf
        lses[..., 3], outs[..., 3, :] = -torch.inf, torch.nan
        outs.requires_grad_(), lses.requires_grad_()
        out, lse = mk.merge_attention(outs, lses)
        dout = torch.randn(out.shape).to(dtype)
        dout[..., 3, :] = torch.inf
        douts, dlses = torch.autograd.grad([out, lse], [outs, lses], [dout, torch.randn_like(lse)])
        assert out.isfinite().all() and (out[..., 3, :] == 0).all() and (lse[..., 3] == -torch.inf).all()
        assert douts.isfinite().all() and dlses.isfinite().all()
        assert (douts[1, ..., :2, :] == 0).all() and (dlses[1, ..., :2] == 0).all()
        assert (douts[..., 3, :] == 0).all() and (dlses[..., 3] == 0).all()
        kept = mk.merge_attention(outs[[0, 2]], lses[[0, 2]])
        torch.testing.assert_close(out[..., :2, :], kept[0][..., :2, :], rtol=0, atol=0)


def test_float16_does_not_overflow():
    outs = torch.full((4, 1, 1, 2, 3), 65504.0, dtype=torch.float16)
    out, lse = mk.merge_attention(outs, torch.full((4, 1, 1, 2), 1e4))
    assert (out == 65504).all() and torch.allclose(lse, torch.tensor(1e4 + 1.3862944))


def test_only_one_input_needs_a_gradient():
    torch.manual_seed(0)
    outs, lses = [torch.randn(2, 3, 4) for _ in range(3)], [torch.randn(2, 3) for _ in range(3)]
    both = [t.clone().requires_grad_() for t in (*outs, *lses)]
    out, lse = mk.merge_attention(both[:3], both[3:])
    wanted = torch.autograd.grad(out.sum() + lse.sum(), both)
    for i in range(6):
        given = [t.detach().requires_grad_(i == j) for j, t in enumerate(both)]
        out, lse = mk.merge_attention(given[:3], given[3:])
        assert torch.equal(torch.autograd.grad(out.sum() + lse.sum(), given[i])[0], wanted[i])


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    [
        (torch.zeros(3), torch.zeros(3), ValueError, "merge_attention: outs: expected at least 2 dimensions"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), ValueError, r"merge_attention: lses: expected shape \(2, 3\), got shape \(2, 4\)"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], torch.zeros(2, 3), TypeError, r"outs\[1\]: expected dtype float32 .*got float16"),
        ([torch.zeros(3, 4), 1.0], torch.zeros(2, 3), TypeError, r"merge_attention: outs\[1\]: expected a tensor, got float"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).double(), TypeError, "merge_attention: lses: expected float32, got float64"),
        (torch.zeros(2, 3, 4).long(), torch.zeros(2, 3), TypeError, "merge_attention: outs: expected float64, float32"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, device="meta"), ValueError, "merge_attention: lses: expected device cpu, got device meta"),
    ],
)
def test_errors(outs, lses, error, text):
    with pytest.raises(error, match=text):
        mk.merge_attention(outs, lses)
