"""The attention family takes indices, offsets and lengths as int64 or int32, as paged caches and ragged batches come with either."""

import pytest
import torch
from cases import places

from memkernels.testing import compare, specs
from memkernels.testing.inputs import draw

CASES = {
    "attention": ("lengths", ("lengths_k",)),
    "attention_varlen": ("ragged", ("cu_seqlens_q", "cu_seqlens_k")),
    "paged_attention": ("typical", ("page_table", "lengths")),
    "quantized_attention": ("lengths", ("lengths_k",)),
    "retrieval_attention": ("typical", ("index",)),
    "segment_attention": ("typical", ("ptr", "index")),
}
BACKENDS = sorted({label for label, device in places("all") if device == "cpu" and ":" not in label})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CASES)
def test_int32(op, backend):
    spec = specs()[op]
    sample = spec.sample(CASES[op][0])
    given = draw(spec, sample, torch.float32)
    short = {**given, **{name: given[name].int() for name in CASES[op][1]}}
    assert all(short[name].dtype == torch.int32 for name in CASES[op][1])

    def results(inputs):
        with compare.using(backend):
            return compare.evaluate(spec, inputs, dict(sample.options), lambda outputs: compare.make.upstream(outputs, torch.float32))

    wanted, found = results(given), results(short)
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_op_with_indices_is_here():
    names = {n for n, spec in specs().items() if "attention" in n and any(i.dtype == torch.int64 for i in spec.inputs.values())}
    assert names == set(CASES)
