"""usage in plain torch: (u + (1 - u) (1 - prod_h(1 - w_h))) prod_r(1 - f_r r_r)."""

from memkernels.backends.reference._math import compute, other_factors


def _parts(usage, write_weights, read_weights, free_gate):
    """Usage after the writes, and what each write head and each read head leaves: "B N", "B H N", "B R N"."""
    unwritten, kept = 1 - write_weights, 1 - free_gate[..., None] * read_weights
    return usage + (1 - usage) * (1 - unwritten.prod(1)), unwritten, kept


def forward(usage, write_weights, read_weights, free_gate):
    written, _, kept = _parts(*(compute(t) for t in (usage, write_weights, read_weights, free_gate)))
    return ((written * kept.prod(1)).to(usage.dtype),)


def backward(dout, usage, write_weights, read_weights, free_gate):
    dtype, d, usage, read_weights, free_gate = usage.dtype, *(compute(t) for t in (dout, usage, read_weights, free_gate))
    written, unwritten, kept = _parts(usage, compute(write_weights), read_weights, free_gate)
    dwritten, dkept = d * kept.prod(1), (d * written)[:, None] * other_factors(kept)
    dwrite_weights = (dwritten * (1 - usage))[:, None] * other_factors(unwritten)
    dfree_gate, dread_weights = -(dkept * read_weights).sum(2), -dkept * free_gate[..., None]
    return tuple(t.to(dtype) for t in (dwritten * unwritten.prod(1), dwrite_weights, dread_weights, dfree_gate))
