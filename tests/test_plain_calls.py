"""Plain calls skip the dispatcher: what must be the same with and without that short cut."""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import memkernels as mk
from memkernels.testing.inputs import differentiable, draw, tensors_of
from memkernels.testing.spec import specs

NAMES = sorted(specs())


def _case(name, dtype=torch.float32):
    spec = specs()[name]
    return spec, draw(spec, spec.samples[0], dtype)


def _call(spec, inputs):
    return tensors_of(spec.call(spec.function, inputs, dict(spec.samples[0].options)))


def _leaves(spec, inputs):
    names = differentiable(spec, inputs)
    return {k: t.requires_grad_() if k in names else t for k, t in inputs.items()}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_holds_the_op(name, grad):
    spec, inputs = _case(name)
    names = [k for k, t in inputs.items() if t is not None]

    def function(*tensors):
        return tuple(_call(spec, {**inputs, **dict(zip(names, tensors, strict=True))}))

    given = tuple(inputs[k].detach().requires_grad_(grad and inputs[k].is_floating_point()) for k in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, given)
    assert f"memkernels::{name}" in str(traced.graph)
    for ours, expected in zip(tensors_of(traced(*given)), function(*given), strict=True):
        torch.testing.assert_close(ours, expected)


def _negative(t):
    """The same values with torch's negative bit set."""
    if t is None or not t.is_floating_point():
        return t
    hidden = torch.complex(torch.zeros_like(t), -t.detach()).conj().imag
    assert hidden.is_neg()
    return hidden


@pytest.mark.parametrize("sample", [{}, {"width": 1}])
@pytest.mark.parametrize("name", NAMES)
def test_the_negative_bit_is_seen(name, sample):
    spec = specs()[name]
    one = {k: 1 for k in ("W", "D", "V", "H", "I") if k in spec.samples[0].dims} if sample else {}
    small = dataclasses.replace(spec.samples[0], dims={**spec.samples[0].dims, **one})
    inputs = draw(spec, small, torch.float32)
    expected = _call(spec, dict(inputs))
    found = _call(spec, {k: _negative(t) for k, t in inputs.items()})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = _leaves(spec, inputs)
    outputs = [t for t in _call(spec, dict(leaves)) if t.requires_grad]
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    upstream = [torch.randn(t.shape) for t in outputs]
    plain = torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(outputs, wanted, [_negative(g) for g in upstream]), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_negative_bit_is_seen_in_place():
    memory, weights, ones = torch.randn(1, 3, 1), torch.rand(1, 1, 3), torch.ones(1, 1, 1)
    expected = mk.memory_write(memory, weights, ones, ones)
    torch.testing.assert_close(mk.memory_write_(memory.clone(), _negative(weights), _negative(ones), ones), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forward", [contextlib.nullcontext, FlopCounterMode])
def test_checkpointing_across_contexts(name, forward):
    spec, inputs = _case(name)
    leaves = _leaves(spec, inputs)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]

    def run():
        return sum(t.sum() for t in _call(spec, dict(leaves)))

    expected = torch.autograd.grad(run(), wanted)
    with forward() if forward is contextlib.nullcontext else forward(display=False):
        out = checkpoint(run, use_reentrant=False)
    with FlopCounterMode(display=False) if forward is contextlib.nullcontext else contextlib.nullcontext():
        found = torch.autograd.grad(out, wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_new_state_of_a_cell_may_be_changed_in_place():
    cell, reference = mk.nn.LSTMCell(3, 4), torch.nn.LSTMCell(3, 4)
    cell.load_state_dict(reference.state_dict())
    x, gradients = torch.randn(2, 3), []
    for module in (cell, reference):
        h, c = module(x)
        h.mul_(2), c.mul_(0.5)
        (h.sum() + c.sum()).backward()
        gradients.append(module.weight_ih.grad)
    torch.testing.assert_close(*gradients)


def test_no_write_to_an_inference_tensor_outside_inference_mode():
    with torch.inference_mode():
        memory = torch.ones(1, 2, 2)
    ones = torch.ones(1, 1, 2)
    with pytest.raises(RuntimeError, match="memory_write_: memory: expected a normal tensor"):
        mk.memory_write_(memory, ones, ones, ones)


def test_numbers_of_other_libraries():
    q = torch.randn(1, 2, 3, 4)
    expected = mk.attention(q, q, q, scale=0.3)
    for scale in (np.float32(0.3), torch.tensor(0.3)):
        torch.testing.assert_close(mk.attention(q, q, q, None, torch.tensor(0.0), scale=scale), expected)


@pytest.mark.parametrize(
    "change", [lambda q: (torch.nested.nested_tensor([q[0], q[0]]), q, q, None), lambda q: (q, q, q, torch.ones(3, 3).to_sparse())]
)
def test_dense_tensors_only(change):
    with pytest.raises(TypeError, match=r"attention: (query|attn_mask): expected a dense strided tensor"):
        mk.attention(*change(torch.randn(1, 2, 3, 4)))
