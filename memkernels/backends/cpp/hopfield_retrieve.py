"""hopfield_retrieve on the CPU (csrc/cpu/hopfield_retrieve.cpp); its backward is that of attention, step by step."""

from memkernels._C import hopfield_retrieve as _forward
from memkernels._C import hopfield_step_backward
from memkernels.backends import _hopfield


def supports(query, key, beta, value, mask, scale, steps, tolerance, return_state):
    return None


def forward(
    read, state, states, stats, moves, exact, query, key, beta, value, mask, scale, steps, tolerance, return_state
):  # fmt: skip
    # Out of the half types the states must not be rounded from step to step.
    given = [t if t is None or exact is None else t.float() for t in (query, key, beta, value)]
    _forward(read if exact is None else exact, states, stats, moves, *given, mask, scale, steps, tolerance)
    if exact is not None:
        read.copy_(exact)
    if state is not None:
        state.copy_(states[-1] if steps > 1 else query)


def backward(
    dquery, dkey, dbeta, dvalue, dread, dstate, query, key, beta, value, mask, read, states, stats, moves, exact, scale, steps, tolerance,
    return_state,
):  # fmt: skip
    saved = read if exact is None or exact.dim() == 1 else exact, states, stats, moves
    dstate = dstate if return_state else None
    gradients, inputs = (dquery, dkey, dbeta, dvalue), (query, key, beta, value, mask)
    _hopfield.backward(hopfield_step_backward, gradients, dread, dstate, inputs, saved, scale, steps, tolerance)
