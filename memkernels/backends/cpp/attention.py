"""attention on the CPU (csrc/cpu/attention.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous


def supports(query, key, value, attn_mask, seed, scale, dropout_p, left, right, causal):
    return None


def forward(out, lse, query, key, value, attn_mask, seed, *options):
    inputs = [inner_contiguous(t) for t in (query, key, value, attn_mask)]
    _C.attention(out, lse, *inputs, seed, *_numbers(query, key, *options))


def backward(dquery, dkey, dvalue, dattn_mask, dout, dlse, query, key, value, attn_mask, seed, out, lse, *options):
    inputs = [inner_contiguous(t) for t in (query, key, value, attn_mask)]
    gradients = dquery, dkey, dvalue, dattn_mask, inner_contiguous(dout), dlse
    _C.attention_backward(*gradients, *inputs, seed, inner_contiguous(out), lse, *_numbers(query, key, *options))


def _numbers(query, key, scale, dropout_p, left, right, causal):
    """The options as the kernels take them: the corner becomes the key at which query 0 stands."""
    return scale, dropout_p, left, right, key.shape[2] - query.shape[2] if causal == "bottom-right" else 0
