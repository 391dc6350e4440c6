"""The spec of `ntm_sequence`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.ntm_sequence import NTMState, ntm_sequence
from memkernels.testing.recurrent import bounded, weight
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution

_STATE = ("memory", "read_weights", "write_weights", "reads", "hidden", "cell")


def _call(function, inputs, options):
    rest = {name: t for name, t in inputs.items() if name not in _STATE}
    return function(rest.pop("input"), NTMState(*(inputs[name] for name in _STATE)), **rest, **options)


def _step(x, state, controller, bias, heads, form, sizes):
    """One step as a few dozen torch ops, which is what an NTM is elsewhere."""
    memory, w, reads, h, c = state
    readers, writers, width, scalars = sizes
    i, f, g, o = (torch.cat([x, reads.flatten(1), h], 1) @ controller.mT + bias).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    raw = h @ heads[:, :-1].mT + heads[:, -1]
    every, own = readers + writers, form == "graves"
    key, s, erase, add = raw.split([every * width, every * scalars, writers * width, writers * width], -1)
    key, s, erase, add = (
        t.unflatten(-1, shape)
        for t, shape in zip((key, s, erase, add), ((every, width), (every, scalars), (writers, width), (writers, width)))
    )
    eps = 1e-6 if own else 1e-16
    norms = (key.square().sum(-1, keepdim=True) + eps).sqrt() * (memory.square().sum(-1) + eps).sqrt()[:, None]
    content = torch.softmax((F.softplus(s[..., 0:1]) + own) * (key @ memory.mT) / norms, -1)
    gate, taps = torch.sigmoid(s[..., 1:2]), torch.softmax(s[..., 3:], -1)
    gated, reach = gate * content + (1 - gate) * w, (scalars - 4) // 2
    shifted = sum(taps[..., reach + j, None] * gated.roll(j, -1) for j in range(-reach, reach + 1))
    powers = shifted ** (1 + F.softplus(s[..., 2:3]))
    w = powers / powers.sum(-1, keepdim=True)
    kept = torch.prod(1 - w[:, readers:, :, None] * torch.sigmoid(erase)[:, :, None], 1)
    written = memory * kept + w[:, readers:].mT @ (torch.tanh(add) if own else add)
    reads = w[:, :readers] @ (written if own else memory)
    return written, w, reads, h, c


def _eager(
    input, state, weight_ih, weight_rh, weight_hh, bias, read_key, read_scalars, write_key, write_scalars, write_vectors, form="graves"
):  # fmt: skip
    controller = torch.cat([weight_ih, weight_rh.flatten(1), weight_hh], 1)
    parts = (read_key, write_key, read_scalars, write_scalars, write_vectors.flatten(0, 1))
    heads = torch.cat([p.flatten(0, 1) for p in parts])
    sizes = (len(read_key), len(write_key), read_key.shape[1], read_scalars.shape[1])
    now = (state.memory, torch.cat([state.read_weights, state.write_weights], 1), *state[3:])
    hidden, reads = [], []
    for x in input:
        now = _step(x, now, controller, bias, heads, form, sizes)
        reads.append(now[2])
        hidden.append(now[3])
    read_weights, write_weights = now[1].split(sizes[:2], 1)
    steps = [torch.stack(all) if all else now[i][None][:0] for all, i in ((hidden, 3), (reads, 2))]
    return *steps, NTMState(now[0], read_weights, write_weights, *now[2:])


def _zero_rows(inputs):
    """A memory row of zeros, and keys of zeros, as a fresh memory has them."""
    memory, key = inputs["memory"].clone(), inputs["read_key"].clone()
    memory[:, 0], key[0] = 0, 0
    return {**inputs, "memory": memory, "read_key": key}


def _wrong_form(inputs, options):
    options["form"] = "ntm"


def _wrong_heads(inputs, options):
    inputs["write_key"] = inputs["write_key"].new_zeros(3, 3, 4)


def _wrong_dtype(inputs, options):
    inputs["memory"] = inputs["memory"].long()


_NTM = dict(form="pytorch-ntm")
_COPY = dict(T=41, I=9, H=100, N=128, W=20, R=1, U=1, S=1)
SPEC = OpSpec(
    name="ntm_sequence",
    function=ntm_sequence,
    inputs={
        "input": Input("T B I"),
        "memory": Input("B N W"),
        "read_weights": Input("B R N", distribution),
        "write_weights": Input("B U N", distribution),
        "reads": Input("B R W", bounded),
        "hidden": Input("B H", bounded),
        "cell": Input("B H"),
        "weight_ih": Input("4H I", weight),
        "weight_rh": Input("4H R W", weight),
        "weight_hh": Input("4H H", weight),
        "bias": Input("4H", bounded),
        "read_key": Input("R W H+1", weight),
        "read_scalars": Input("R 2S+4 H+1", weight),
        "write_key": Input("U W H+1", weight),
        "write_scalars": Input("U 2S+4 H+1", weight),
        "write_vectors": Input("2 U W H+1", weight),
    },
    call=_call,
    samples=(
        Sample("typical", dict(T=3, B=2, I=2, H=3, N=5, W=3, R=1, U=1, S=1)),
        Sample("pytorch_ntm", dict(T=3, B=2, I=2, H=3, N=5, W=3, R=1, U=1, S=1), _NTM),
        Sample("heads", dict(T=5, B=3, I=3, H=5, N=19, W=4, R=2, U=3, S=2)),
        Sample("zero_rows", dict(T=2, B=2, I=2, H=3, N=5, W=3, R=1, U=1, S=1), twist=_zero_rows, hard=True),
        Sample("odd", dict(T=10, B=5, I=7, H=17, N=37, W=19, R=1, U=1, S=1), _NTM),
        Sample("no_steps", dict(T=0, B=2, I=2, H=3, N=5, W=3, R=1, U=1, S=1)),
    ),
    bench=(
        Sample("copy20_B64", dict(B=64, **_COPY), _NTM),
        Sample("copy20_B1", dict(B=1, **_COPY), _NTM),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["T"] * d["B"] * (d["I"] + d["H"] + d["R"] * d["W"] + (d["R"] + d["U"]) * d["N"]),
    bytes_backward=lambda d, s: 2 * s * d["T"] * d["B"] * (d["I"] + 6 * d["H"] + d["R"] * d["W"] + (d["R"] + d["U"]) * d["N"]),
    errors=(
        ErrorCase("form", _wrong_form, ValueError, r"ntm_sequence: form: expected .*'graves'.*got 'ntm'"),
        ErrorCase("heads", _wrong_heads, ValueError, r"ntm_sequence: write_key: expected .*U=1.*got .*3"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"ntm_sequence: memory: expected .*float64.*got .*int64"),
    ),
    rows=(*(("input", 1), ("memory", 0), ("read_weights", 0), ("write_weights", 0), ("reads", 0), ("hidden", 0), ("cell", 0)),),
)
