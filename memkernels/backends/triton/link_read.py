"""link_read on Triton (_link.py)."""

from memkernels.backends.triton import _link


def supports(link, read_weights):
    return _link.refusal(link, read_weights)


def forward(forward, backward, link, read_weights):
    _link.step(None, None, forward, backward, link, None, None, read_weights)


def backward(dlink, dread_weights, dforward, dbackward, link, read_weights):
    _link.step_backward((dlink, None, None, dread_weights), (None, None, dforward, dbackward), link, None, None, read_weights)


AOT = _link.aot_kernels("link_read", False)
