"""The spec of `dnc_sequence`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from memkernels.ops.dnc_sequence import DNCController, dnc_sequence, interface_shapes
from memkernels.ops.dnc_step import EPS, DNCState
from memkernels.testing.recurrent import bounded, weight
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution, unit
from memkernels.testing.specs.link_step import links

_CONTROLLER = DNCController._fields
_STATE = DNCState._fields


def _features(readers, writers, width, options):
    shapes = interface_shapes(readers, writers, width, options.get("key_mask", False), options.get("sharpen_links", False))
    return sum(torch.Size(s).numel() for s in shapes.values())


def _cycled(t, axis, size):
    """As many entries as the interface has, over and over the ones there are: the sizes of a spec vary independently."""
    if t.shape[axis] == size:
        return t
    return (
        t.index_select(axis, torch.arange(size, device=t.device) % t.shape[axis])
        if t.shape[axis]
        else t.new_zeros([size if d == axis % t.dim() else n for d, n in enumerate(t.shape)])
    )


def _call(function, inputs, options):
    state = DNCState(*(inputs[n] for n in _STATE))
    size = _features(state.read_weights.shape[1], state.write_weights.shape[1], state.memory.shape[2], options)
    if inputs.get("hidden") is None:
        return function(_cycled(inputs["input"], 2, size), state, **options)
    controller = DNCController(*(inputs[n] for n in _CONTROLLER))
    interface, bias = (None if t is None else _cycled(t, 0, size) for t in controller[-2:])
    return function(inputs["input"], state, controller._replace(weight_interface=interface, bias_interface=bias), **options)


def _activated(vector, sizes, options):
    asked: dict[str, Any] = {}
    readers, writers, width = sizes
    shapes = interface_shapes(readers, writers, width, options.get("key_mask", False), options.get("sharpen_links", False))
    for (name, shape), part in zip(shapes.items(), vector.split([torch.Size(s).numel() for s in shapes.values()], -1)):
        x = part.unflatten(-1, shape)
        if name in ("read_keys", "write_keys", "add"):
            asked[name] = x.tanh() if options.get("bounded") else x
        elif name in ("read_strengths", "write_strengths"):
            asked[name] = F.softplus(x) + (options.get("strength", "oneplus") == "oneplus")
        elif name == "link_sharpness":
            asked[name] = 1 + F.softplus(x)
        else:
            asked[name] = torch.softmax(x, -1) if name == "read_modes" else x.sigmoid()
    return asked


def _content(memory, keys, strengths, mask, cosine):
    mask = torch.ones_like(keys) if mask is None else mask
    dot, rows = (keys * mask * mask) @ memory.mT, mask.square() @ memory.square().mT
    inside, outside = (1e-30 if cosine == "product" else EPS), (0 if cosine == "roots" else EPS)
    norms = ((keys * mask).square().sum(-1, keepdim=True) + inside).sqrt() * (rows + inside).sqrt() + outside
    return torch.softmax(strengths[..., None] * dot / norms, -1)


def _allocated(usage, gates):
    found = []
    for gate in gates.unbind(1):
        s, order = torch.sort(EPS + (1 - EPS) * usage, dim=1, stable=True)
        before = torch.cumprod(torch.cat([torch.ones_like(s[:, :1]), s], 1), 1)[:, :-1]
        found.append(((1 - s) * before).gather(1, order.argsort(1)))
        usage = usage + (1 - usage) * gate[:, None] * found[-1]
    return torch.stack(found, 1) if found else usage.new_zeros(len(usage), 0, usage.shape[1])


def _step(state, ask, options):
    """One step of the memory as a few dozen torch ops, which is what a DNC is elsewhere."""
    memory, used, link, last, write, read = state
    cosine, heads = options.get("cosine", "roots"), write.shape[1]
    seen = write if options.get("write_gradient") else write.detach()
    kept = (1 - ask["free_gate"][..., None] * read).prod(1)
    used = (used + (1 - used) * (1 - (1 - seen).prod(1))) * kept
    free = _allocated(used, ask["allocation_gate"] * ask["write_gate"])
    content = _content(memory, ask["write_keys"], ask["write_strengths"], ask.get("write_mask"), cosine)
    gate = ask["allocation_gate"][..., None]
    write = ask["write_gate"][..., None] * (gate * free + (1 - gate) * content)
    memory = memory * kept[..., None] if options.get("deallocate") else memory
    memory = memory * (1 - write[..., None] * ask["erase"][:, :, None]).prod(1) + write.mT @ ask["add"]
    link = (1 - write[..., None] - write[..., None, :]) * link + write[..., None] * last[..., None, :]
    link = link * (1 - torch.eye(link.shape[-1], dtype=link.dtype))
    last = (1 - write.sum(-1, keepdim=True)) * last + write
    ways = [(read[:, None] @ m).transpose(1, 2) for m in (link.mT, link)]
    if "link_sharpness" in ask:
        ways = [torch.softmax(s[..., None, None] * (w + EPS).log(), -1) for w, s in zip(ways, ask["link_sharpness"].unbind(-1))]
    content, modes = _content(memory, ask["read_keys"], ask["read_strengths"], ask.get("read_mask"), cosine), ask["read_modes"][..., None]
    read = modes[:, :, -1] * content + (modes[:, :, :heads] * ways[1]).sum(2) + (modes[:, :, heads:-1] * ways[0]).sum(2)
    return read @ memory, (memory, used, link, last, write, read)


def _eager(input, state, controller=None, **options):
    clip = options.get("clip") or torch.inf
    now = tuple(state)
    sizes = (now[5].shape[1], now[4].shape[1], now[0].shape[2])
    hidden, reads, c = [], [], None
    if controller is not None:
        read, h, c, w_ih, w_rh, w_hh, bias, interface, bias_interface = controller
        matrix = torch.cat([w_ih, w_rh.flatten(1), w_hh], 1)
    for vector in input:
        if controller is not None:
            i, f, g, o = (torch.cat([vector, read.flatten(1), h], 1) @ matrix.mT + bias).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h, c = o.sigmoid() * c.tanh(), c.clamp(-clip, clip)
            vector = h @ interface.mT + bias_interface
            hidden.append(h)
        read, now = _step(now, _activated(vector, sizes, options), options)
        reads.append(read)
    batch = input.shape[1]
    found = (torch.stack(reads) if reads else input.new_zeros(0, batch, sizes[0], sizes[2]), DNCState(*now))
    return found if controller is None else (*found, torch.stack(hidden) if hidden else h[None][:0], c)


def _fresh(inputs):
    """All zeros, as before the first step, and a key of zeros."""
    return {name: torch.zeros_like(inputs[name]) for name in _STATE}


def _wrong_strength(inputs, options):
    options["strength"] = "linear"


def _wrong_heads(inputs, options):
    inputs["link"] = inputs["link"][:, :0]


def _wrong_dtype(inputs, options):
    inputs["memory"] = inputs["memory"].long()


def _dims(T, B, N, W, R, U, key_mask=False, sharpen_links=False, **more):
    features = _features(R, U, W, dict(key_mask=key_mask, sharpen_links=sharpen_links))
    return dict(T=T, B=B, N=N, W=W, R=R, U=U, **(dict(more, P=features) if more else dict(I=features)))


def _bytes(d, s):
    return s * d["T"] * d["B"] * (d["I"] + 6 * d.get("H", 0) + d["R"] * d["W"] + 3 * (d["R"] + d["U"]) * d["N"])


_LET = dict(write_gradient=True)  # without, the gradient is on purpose not that of forward
_EXTRA = dict(write_gradient=True, key_mask=True, sharpen_links=True, deallocate=True)
_PACKAGE = dict(strength="softplus", cosine="product", bounded=True, write_gradient=True)
_MORE = dict(key_mask=True, sharpen_links=True)
SPEC = OpSpec(
    name="dnc_sequence",
    function=dnc_sequence,
    inputs={
        "input": Input("T B I"),
        "memory": Input("B N W"),
        "usage": Input("B N", unit),
        "link": Input("B U N N", links),
        "precedence": Input("B U N", distribution),
        "write_weights": Input("B U N", distribution),
        "read_weights": Input("B R N", distribution),
        "reads": Input("B R W", bounded, optional=True),
        "hidden": Input("B H", bounded, optional=True),
        "cell": Input("B H", optional=True),
        "weight_ih": Input("4H I", weight, optional=True),
        "weight_rh": Input("4H R W", weight, optional=True),
        "weight_hh": Input("4H H", weight, optional=True),
        "bias": Input("4H", bounded, optional=True),
        "weight_interface": Input("P H", weight, optional=True),
        "bias_interface": Input("P", bounded, optional=True),
    },
    call=_call,
    samples=(
        Sample("typical", _dims(2, 2, 5, 3, 2, 1), _LET),
        Sample("controller", _dims(3, 2, 5, 3, 1, 1, I=2, H=3), dict(clip=0.5, **_LET), present=_CONTROLLER),
        Sample("package", _dims(2, 2, 4, 2, 1, 2), _PACKAGE),
        Sample("options", _dims(2, 2, 5, 2, 1, 1, **_MORE, I=2, H=3), _EXTRA, present=_CONTROLLER),
        Sample("fresh", _dims(2, 2, 5, 3, 1, 1), dict(cosine="roots_and_product"), twist=_fresh, hard=True),
        Sample("odd", _dims(5, 3, 19, 5, 5, 1, I=3, H=5), dict(cosine="product", **_LET), present=_CONTROLLER),
        Sample("no_steps", _dims(0, 2, 5, 3, 1, 1, I=2, H=3), _LET, present=_CONTROLLER),
    ),
    bench=(
        Sample("B32_N64_W32_R4_T40", _dims(40, 32, 64, 32, 4, 1, I=16, H=64), present=_CONTROLLER),
        Sample("B8_N256_W64_R4_T40", _dims(40, 8, 256, 64, 4, 1, I=16, H=64), present=_CONTROLLER),
    ),
    peers={"eager": _eager},
    bytes=_bytes,
    bytes_backward=lambda d, s: 2 * _bytes(d, s),
    errors=(
        ErrorCase("strength", _wrong_strength, ValueError, r"dnc_sequence: strength: expected .*'oneplus'.*got 'linear'"),
        ErrorCase("heads", _wrong_heads, ValueError, r"dnc_sequence: precedence: expected .*U=0.*got .*1"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"dnc_sequence: memory: expected .*float64.*got .*int64"),
    ),
    rows=(("input", 1), *((name, 0) for name in _STATE)),
)
