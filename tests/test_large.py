"""Offsets beyond 2^31 elements, in every input and upstream gradient of every kernel, simulated by strides in a process of its own."""

import pytest
from cases import places
from child import run_python

KERNELS = [label for label, device in places("all") if label != "reference" and device == "cpu"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", KERNELS[:1])
def test_offsets_beyond_32_bits(backend):
    out = run_python(f"import large; large.run_all({backend!r}, 3)", timeout=300)
    assert int(out.split()[-1]) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_32_bits_of_all_samples(backend):
    run_python(f"import large; large.run_all({backend!r}, None)", timeout=1000)
