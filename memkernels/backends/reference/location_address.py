"""location_address in plain torch: interpolation, circular shift, and sharpening of w_s over its largest element."""

import math

import torch

from memkernels.backends.reference._math import compute

# Below these the slope of a row of nothing but such weights would leave the range of the dtype.
LEAST = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}


def _circle(rows, taps, sign):
    """`rows` "B R N" -> "B R N 2S+1": at i and tap j, element (i + sign * j) mod N."""
    count, reach = rows.shape[-1], taps // 2
    place = torch.arange(count, device=rows.device)[:, None] + sign * torch.arange(-reach, reach + 1, device=rows.device)
    return rows[..., place % max(count, 1)]


def _shifted(content, previous, gate, shift):
    """The interpolated weights as each tap sees them, and their sum over the taps."""
    gated = gate[..., None] * content + (1 - gate)[..., None] * previous
    seen = _circle(gated, shift.shape[-1], -1)
    return seen, (seen @ shift[..., None]).squeeze(-1)


def _largest(shifted):
    if shifted.shape[-1] == 0:
        return shifted.new_ones(*shifted.shape[:-1], 1)
    top = shifted.detach().amax(-1, keepdim=True)
    return top.masked_fill(top <= 0, 1)


def _powers(shifted, sharpen, top, floor):
    """Of w_s / top: where it is positive, itself, its logarithm and power sharpen - 1 (elsewhere 0, 0, 1); the sum of powers."""
    ratio = shifted / top
    positive = ~(ratio <= 0)  # so that NaN stays NaN
    ratio = torch.where(positive, ratio, 0)
    logarithm = torch.where(positive, ratio, 1).log()
    power = torch.exp((sharpen - 1)[..., None] * logarithm)
    total = (ratio * power).sum(-1, keepdim=True)
    if floor:
        total = total + torch.exp(math.log(floor) - sharpen[..., None] * top.log())
    return positive, ratio, logarithm, power, total


def forward(content, previous, gate, shift, sharpen, floor=0.0):
    """`floor` is added to the sum of w_s^sharpen that the weights are shares of."""
    dtype, content, previous, gate, shift, sharpen = content.dtype, *(compute(t) for t in (content, previous, gate, shift, sharpen))
    _, shifted = _shifted(content, previous, gate, shift)
    top = _largest(shifted)
    _, ratio, _, power, total = _powers(shifted, sharpen, top, floor)
    weights = ratio * power / total.masked_fill(total == 0, 1)
    return weights.to(dtype), torch.cat((top, total), -1).detach()


def backward(dweights, content, previous, gate, shift, sharpen, weights, stats, floor=0.0):
    dtype, content, previous, gate, shift, sharpen = content.dtype, *(compute(t) for t in (content, previous, gate, shift, sharpen))
    seen, shifted = _shifted(content, previous, gate, shift)
    top = _largest(shifted)
    positive, ratio, logarithm, power, total = _powers(shifted, sharpen, top, floor)
    total = total.masked_fill(total == 0, 1)
    weights, d = ratio * power / total, compute(dweights)
    centred = d - (weights * d).sum(-1, keepdim=True)
    dsharpen = (weights * centred * logarithm).sum(-1)
    if floor:  # else the weights sum to 1 and the largest drops out
        dsharpen = dsharpen + top.log().squeeze(-1) * (weights * centred).sum(-1)
    slope = sharpen[..., None] / (total * top.clamp(min=LEAST[top.dtype]))
    dshifted = torch.where(positive, slope * power * centred, 0)
    dgated = (_circle(dshifted, shift.shape[-1], 1) @ shift[..., None]).squeeze(-1)
    dshift = (dshifted[..., None, :] @ seen).squeeze(-2)
    dgate = (dgated * (content - previous)).sum(-1)
    gradients = gate[..., None] * dgated, (1 - gate)[..., None] * dgated, dgate, dshift, dsharpen
    return tuple(g.to(dtype) for g in gradients)
