"""Write weights that prefer the rows least in use."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_number, fail
from memkernels._registry import Arg, Out, define_op, new_empty


def allocation(usage: torch.Tensor, *, write_gates: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Allocation weights: the least used row gets most, the next one a share of what is left, and so on.

    Formula:
        ``s = eps + (1 - eps) * usage``, rows in the order phi of ascending s, of equal ones the lowest first:
        ``out[phi_j] = (1 - s[phi_j]) * prod_{i<j} s[phi_i]``. With `write_gates` heads take turns, each seeing what those before will fill:
        ``out[h]`` from ``usage_h``, ``usage_{h+1} = usage_h + (1 - usage_h) * write_gates[h] * out[h]``.

    Args:
        usage: "B N", float64, float32, bfloat16 or float16; any strides; in [0, 1].
        write_gates: "B H" or None, same dtype and device; how much of its allocation each write head will write. The last one is not used.
        eps: the least usage, in [0, 1): keeps the gradient of the product alive where nothing is in use.

    Returns:
        "B N", or "B H N" with `write_gates`; same dtype, contiguous. A row sums to at most 1.

    Gradients:
        To both, through the sorted values with the order held constant; of any order; without a division, so exact at usage 0 and 1.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded once, at the end. NaN comes last in the order.
        Deterministic; a batch row does not depend on the other rows. The formula jumps where two rows change places, so rows that differ by
        less than a dtype resolves get other weights in another dtype: with several heads at usage 0 all but the first few do.

    Raises:
        ValueError: a size differs from what another argument says; `eps` outside [0, 1); more than 2^31 - 1 rows.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods, dynamic memory allocation; the
        simulation over heads is that of their code.

    Example:
        >>> import torch, memkernels as mk
        >>> mk.allocation(torch.tensor([[1.0, 0.5, 0.0, 0.5]]), eps=0.0)
        tensor([[0., 0., 1., 0.]])
        >>> mk.allocation(torch.tensor([[1.0, 0.5, 0.5]]), eps=0.0)
        tensor([[0.0000, 0.5000, 0.2500]])
    """
    eps = check_number("allocation", "eps", eps)
    if not 0 <= eps < 1:
        fail("allocation", "eps", "a number in [0, 1)", eps)
    SIGNATURE(usage, write_gates)
    if usage.shape[1] >= 2**31:
        fail("allocation", "usage", "fewer than 2^31 rows", usage.shape[1])
    (out,) = OP(usage, write_gates, eps)
    return out


def _allocate(usage, write_gates, eps):
    batch, rows = usage.shape
    return (new_empty(usage, (batch, rows) if write_gates is None else (batch, write_gates.shape[1], rows)),)


SIGNATURE = Signature("allocation", usage="B N", write_gates="B H | None")
OP = define_op(
    "allocation",
    inputs=(Arg("usage"), Arg("write_gates", optional=True)),
    outputs=(Out("out"),),
    options="float eps",
    allocate=_allocate,
    autocast="float32",
)
