"""attention as an attention function of Hugging Face transformers: its arguments mean what "eager" makes of them."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import memkernels as mk
from memkernels.integrations import huggingface_attention, register_huggingface

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "huggingface_attention.py"


def eager(module, query, key, value, attention_mask, scaling=None, is_causal=None, position_bias=None, **options):
    """What transformers' models compute themselves, where a causal mask is made from `is_causal` as for "sdpa"."""
    groups, scaling = query.shape[1] // key.shape[1], query.shape[3] ** -0.5 if scaling is None else scaling
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if position_bias is not None:
        scores = scores + position_bias[..., : key.shape[2]]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[..., : key.shape[2]], -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous()


def padding(*shape):
    torch.manual_seed(2)
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    return mask


BIAS = torch.randn(1, 4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CASES = {
    "causal": dict(keys=5),
    "causal, static cache": dict(keys=9),
    "one token": dict(queries=1, keys=9),
    "encoder": dict(keys=7, module=SimpleNamespace(is_causal=False)),
    "argument before attribute": dict(keys=7, module=SimpleNamespace(is_causal=True), is_causal=False),
    "bool mask": dict(keys=7, attention_mask=padding(2, 1, 5, 7)),
    "mask longer than the keys": dict(keys=7, attention_mask=padding(2, 1, 5, 11)),
    "float mask": dict(keys=7, attention_mask=(~padding(2, 1, 5, 7)).double() * torch.finfo(torch.float64).min),
    "bias": dict(keys=7, position_bias=BIAS, is_causal=False),
    "bias, causal": dict(keys=5, position_bias=BIAS),
    "bias, bool mask": dict(keys=7, position_bias=BIAS, attention_mask=padding(2, 1, 5, 7)),
    "bias, float mask": dict(keys=7, position_bias=BIAS, attention_mask=torch.randn(2, 1, 5, 7, dtype=torch.float64)),
    "scaling": dict(keys=7, scaling=0.3, attention_mask=padding(2, 1, 5, 7)),
    "what does not matter": dict(keys=5, sliding_window=None, output_attentions=False, cache=None, softcap=None, s_aux=None),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_arguments_mean_what_eager_makes_of_them(case, heads):
    options = dict(module=SimpleNamespace(), queries=5, attention_mask=None) | CASES[case]
    queries, keys = options.pop("queries"), options.pop("keys")
    torch.manual_seed(0)
    shapes = ((2, heads[0], queries, 8), (2, heads[1], keys, 8), (2, heads[1], keys, 6))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    leaves = [*tensors]
    if "position_bias" in options:
        options["position_bias"] = options["position_bias"].clone().requires_grad_()
        leaves.append(options["position_bias"])
    module = options.pop("module")
    wanted = eager(module, *tensors, **options)
    found, weights = huggingface_attention(module, *tensors, **options)
    assert weights is None and found.is_contiguous()
    upstream = torch.randn_like(wanted)
    for a, b in zip([found, *torch.autograd.grad(found, leaves, upstream)], [wanted, *torch.autograd.grad(wanted, leaves, upstream)]):
        torch.testing.assert_close(a, b)


def test_dropout_and_options_under_their_names():
    tensors = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    assert (huggingface_attention(SimpleNamespace(), *tensors, None, dropout=1.0)[0] == 0).all()
    with pytest.raises(ValueError, match=r"huggingface_attention: cache: expected None .*got object"):
        huggingface_attention(SimpleNamespace(), *tensors, None, cache=object())
    for theirs, ours, given in (("softcap", "softcap", 5.0), ("s_aux", "sink", torch.ones(2))):
        found = huggingface_attention(SimpleNamespace(), *tensors, None, **{theirs: given})[0]
        wanted = mk.attention(*tensors, is_causal=True, **{ours: given}).transpose(1, 2)
        assert torch.equal(found, wanted) and not torch.equal(wanted, mk.attention(*tensors, is_causal=True).transpose(1, 2))


def test_example_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="this example needs Hugging Face transformers"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    with pytest.raises(ImportError):
        register_huggingface()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_example(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 7
