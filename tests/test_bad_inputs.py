"""Every tensor of every op, spoilt in every way: a clear error of ours, or, where the op allows it, the reference's result."""

import traceback
from pathlib import Path

import pytest
import torch
from cases import DTYPES, INTERPRETED, select
from checks import assert_unchanged, copies

from memkernels.testing import specs

pytestmark = pytest.mark.skipif(INTERPRETED, reason="checks of arguments, which know no backend")


def spoilt(t):
    """(what was done, what is given instead of the tensor)"""
    yield "None", None
    yield "number", 3.0
    yield "list", t.tolist()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool, torch.complex64):
        if t.dtype != dtype:
            yield str(dtype), t.to(dtype)
    yield "scalar", t.new_zeros(())
    yield "one dimension more", t[None]
    yield "one dimension more inside", t[..., None]
    yield "one dimension less", t[0]
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    for axis, n in enumerate(t.shape):
        yield f"axis {axis} one longer", torch.cat([t, t.narrow(axis, 0, 1)], axis)
        yield f"axis {axis} empty", t.narrow(axis, 0, 0)
        if n > 1:
            yield f"axis {axis} one shorter", t.narrow(axis, 0, n - 1)
            yield f"axis {axis} of one", t.narrow(axis, 0, 1)


def full(case):
    """The sample of an op with the most of its inputs."""
    samples = [p.values[0] for p in select(dtypes=DTYPES[1:2], hard=False, empty=False) if p.values[0].spec is case.spec]
    return max((c for c in samples if c.backend == case.backend), key=lambda c: (len(c.sample.present), -sum(c.sample.dims.values())))


def outcome(case, given):
    """Outputs; None for a clear error, also where a spec's own `call` finds nothing to pass on."""
    try:
        return case.call(given)
    except Exception as refusal:
        ours = isinstance(refusal, (TypeError, ValueError, IndexError)) and str(refusal).startswith(f"{case.spec.name}: ")
        in_spec = Path(traceback.extract_tb(refusal.__traceback__)[-1].filename).parent == Path(specs.__file__).parent
        assert ours or in_spec, f"{type(refusal).__name__}: {refusal}"
        return None


@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], first=1, kernels_only=True))
def test_spoilt_inputs(case):
    case = full(case)
    good, reference = case.inputs(), type(case)(case.spec, "reference", case.dtype, case.sample)
    for name, t in good.items():
        if t is None:
            continue
        for what, bad in spoilt(t):
            given = {**good, name: bad}
            before = copies(good)
            try:
                found, wanted = outcome(case, given), outcome(reference, given)
                assert (found is None) == (wanted is None), "not as the reference"
                for a, b in zip(found or (), wanted or ()):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            except Exception as error:
                raise AssertionError(f"{case}: {name}: {what}: {type(error).__name__}: {error}") from error
            assert_unchanged(good, before, f"{name}: {what}")
