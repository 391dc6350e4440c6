"""Recurrent weights of several heads: [G H, H / NH], block-diagonal gate by gate, and the dense [G H, H] the kernels take."""


def block_diagonal(weight, heads, gates):
    """The dense matrix, zero outside of the blocks."""
    width, rows = weight.shape[1], weight.shape[0] // (gates * heads)
    dense = weight.new_zeros(gates, heads, rows, heads, width)
    _diagonal(dense).copy_(weight.reshape(gates, heads, rows, width).movedim(1, -1))
    return dense.view(weight.shape[0], heads * width)


def diagonal_blocks(dense, heads, gates, out):
    """The blocks of a dense gradient, into `out`."""
    width, rows = out.shape[1], out.shape[0] // (gates * heads)
    blocks = _diagonal(dense.view(gates, heads, rows, heads, width))
    out.view(gates, heads, rows, width).copy_(blocks.movedim(-1, 1))


def _diagonal(dense):
    return dense.diagonal(dim1=1, dim2=3)  # gates, rows of a head, width, heads
