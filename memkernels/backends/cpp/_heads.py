"""Recurrent weights of several heads: [G H, H / NH], block-diagonal gate by gate, and the dense [G H, H] the kernels take."""


def block_diagonal(weight, heads, gates):
    """The dense matrix, zero outside of the blocks."""
    width = weight.shape[1]
    dense = weight.new_zeros(gates, heads, weight.shape[0] // (gates * heads), heads, width)
    _diagonal(dense).copy_(weight.view(gates, heads, -1, width).movedim(1, -1))
    return dense.view(weight.shape[0], heads * width)


def diagonal_blocks(dense, heads, gates, out):
    """The blocks of a dense gradient, into `out`."""
    width = out.shape[1]
    blocks = _diagonal(dense.view(gates, heads, out.shape[0] // (gates * heads), heads, width))
    out.view(gates, heads, -1, width).copy_(blocks.movedim(-1, 1))


def _diagonal(dense):
    return dense.diagonal(dim1=1, dim2=3)  # gates, rows of a head, width, heads
