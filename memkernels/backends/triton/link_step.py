"""link_step on Triton (_link.py)."""

from memkernels.backends.triton import _link


def supports(link, precedence, write_weights, read_weights):
    return _link.refusal(link, read_weights)


def forward(new_link, new_precedence, forward, backward, link, precedence, write_weights, read_weights):
    _link.step(new_link, new_precedence, forward, backward, link, precedence, write_weights, read_weights)


def backward(dlink, dprecedence, dwrite_weights, dread_weights, *given):
    _link.step_backward((dlink, dprecedence, dwrite_weights, dread_weights), given[:4], *given[4:])


AOT = _link.aot_kernels("link_step", True)
