"""location_address: exact mass at every sharpness, exact zeros, whole steps of one-hot shifts."""

import pytest
import torch
import torch.nn.functional as F

import memkernels as mk
from memkernels.testing.compare import labels, using

BACKENDS = ["reference", *(name for name in labels() if name.startswith("cpp"))]
CASES = [(128, 1), (7, 3), (3, 5), (1, 2)]


def gradients(outputs, arguments):
    return torch.autograd.grad(outputs.square().sum(), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, reach", CASES)
def test_mass_is_kept(rows, reach, backend):
    torch.manual_seed(0)
    uniform = torch.full((2, 3, rows), 1 / rows)
    sharp = torch.softmax(torch.randn(2, 3, rows) * 30, -1)
    one_hot = F.one_hot(torch.zeros(2, 3, dtype=torch.int64), rows).float()
    shift = torch.softmax(torch.randn(2, 3, 2 * reach + 1), -1)
    for content in (uniform, sharp, one_hot):
        for gamma in (1.0, 10.0, 1000.0):
            given = [content, content, torch.rand(2, 3), shift, torch.full((2, 3), gamma)]
            given = [a.clone().requires_grad_() for a in given]
            with using(backend):
                weights = mk.location_address(*given)
                assert (weights.sum(-1) - 1).abs().max() < 1e-5
                assert all(g.isfinite().all() for g in gradients(weights, given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_shifts_roll(backend):
    torch.manual_seed(0)
    content = torch.softmax(torch.randn(1, 9, 5), -1)
    shift = torch.eye(9)[None]  # head h moves by h - 4 rows, 4 and more of 5 rows in a circle too
    with using(backend):
        moved = mk.location_address(content, torch.zeros_like(content), torch.ones(1, 9), shift, torch.ones(1, 9))
    expected = torch.stack([content[0, h].roll(h - 4) for h in range(9)])
    torch.testing.assert_close(moved[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_stay_exactly_zero(backend):
    content = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    shift = torch.tensor([[[0.25, 0.5, 0.25]]], requires_grad=True)
    given = [content, content.detach(), torch.ones(1, 1), shift, torch.full((1, 1), 2.0)]
    with using(backend):
        weights = mk.location_address(*given)
        dcontent, _ = torch.autograd.grad(weights[0, 0] @ torch.tensor([1.0, 2, 3, 5, 7, 11]), (content, shift))
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 4, 1, 0, 0, 0]]]) / 6)
    assert (weights[0, 0, 3:] == 0).all() and dcontent[0, 0, 4] == 0


def test_nothing_to_weigh_is_zero_and_nan_is_not_hidden():
    zero = torch.zeros(1, 1, 4, requires_grad=True)
    given = [zero, zero, torch.ones(1, 1), torch.ones(1, 1, 1), torch.full((1, 1), 3.0)]
    weights = mk.location_address(*given)
    assert (weights == 0).all() and (torch.autograd.grad(weights.sum(), zero)[0] == 0).all()
    bad = torch.tensor([[[0.5, float("nan"), 0.25, 0.25]]])
    assert mk.location_address(bad, bad, *given[2:]).isnan().all()
