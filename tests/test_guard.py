"""C++ kernels at every instruction-set level never touch memory beyond a tensor's last, or before its first, element."""

import pytest
from cases import INTERPRETED, places
from child import run_python
from test_fuzz import LONG_SEED

from memkernels.testing import specs

# Levels that wait for the long form: the baseline has no vectors whose tails could reach over an end, and AVX-512's kernels are those of
# AMX but for its tiles.
LATER = ("cpp:baseline", "cpp:avx512")
BACKENDS = [
    pytest.param(label, marks=pytest.mark.slow) if label in LATER else label
    for label, device in ([] if INTERPRETED else places("all"))
    if label.startswith("cpp") and device == "cpu"
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("thorough", (False, pytest.param(True, marks=pytest.mark.slow)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_stay_inside_their_tensors(backend, thorough):
    out = run_python(f"import guard; guard.run_all({backend!r}, {thorough})", timeout=500)
    assert int(out.split()[-1]) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", specs() if BACKENDS else ())
def test_drawn_calls_stay_inside_their_tensors(op):
    backends = tuple(pair for pair in places("all") if pair[0].startswith("cpp"))
    run_python(f"import guard; guard.run_drawn({op!r}, 150, {LONG_SEED}, {backends!r})", timeout=1000)
