"""Values of every op, generated from the specs: accuracy, layouts, edges, errors, determinism, independence of rows."""

import checks
import pytest
from cases import DTYPES, INTERPRETED, SHORT, Case, one_per_op, select, short
from flat import flat_call
from fuzz import families

from memkernels.testing import GRADIENT_LAYOUTS, LAYOUTS, specs

pytestmark = pytest.mark.timeout(300)
FLOAT = DTYPES[1:2] if INTERPRETED else DTYPES[:2]


def plain(**kwargs):
    """Samples with elements to look at and no values at the edge of the range."""
    return select(hard=False, empty=False, **kwargs)


BEST = dict(levels="best", short=None)
# Later samples of an op than these are seen by test_accuracy alone, the rest of the tests sees them in the long form.
TYPICAL = 4


@pytest.mark.parametrize(
    "case",
    (short(select(dtypes=FLOAT, first=3, **BEST), 3) if SHORT else select(dtypes=FLOAT, **BEST))
    + short(select(dtypes=DTYPES[2:], first=1 if SHORT else None, kernels_only=True, **BEST), 2 * TYPICAL)
    + short(select(levels="lower", dtypes=DTYPES[1:2]), TYPICAL)
    + short(select(levels="lower", dtypes=(DTYPES[0], *DTYPES[2:])), TYPICAL // 2),
)
def test_accuracy(case):
    checks.check_accuracy(case)


LAID_OUT = short(plain(dtypes=FLOAT, kernels_only=True), TYPICAL) + short(
    plain(dtypes=DTYPES[2:], first=2) + plain(levels="lower", first=2), 1
)


@pytest.mark.parametrize("case", LAID_OUT)
def test_input_layouts(case):
    for layout in LAYOUTS:
        checks.check_accuracy(case, layout=layout)


@pytest.mark.parametrize("case", LAID_OUT)
def test_gradient_layouts(case):
    outputs = sum(o.differentiable for o in flat_call(case, case.inputs())[0].outputs)
    for gradient in GRADIENT_LAYOUTS:
        for seed in range(min(outputs, 3) if gradient == "partial" else 1):
            checks.check_accuracy(case, gradient=gradient, seed=seed)


def _zeroed():
    """Every sample with one dimension 0; letters that begin alike (query heads NH, key heads NHk) go together."""
    for parameter in short(select(hard=False, empty=False, dtypes=FLOAT[-1:], short=2), TYPICAL):
        case = parameter.values[0]
        for family in families(case.spec, case.sample.dims):
            zeroed = case.with_dims(**dict.fromkeys(family, 0))
            try:
                zeroed.inputs()
            except (IndexError, RuntimeError):
                continue  # the twist of the sample has nothing to twist
            yield pytest.param(zeroed, id=str(zeroed), marks=parameter.marks)


@pytest.mark.parametrize("case", list(_zeroed()))
def test_every_dimension_zero(case):
    if case.reason() is None:
        checks.check_accuracy(case, slack=8)  # many values that are all alike: the reference is exact by luck


@pytest.mark.parametrize("case", select(dtypes=FLOAT[-1:]))
def test_outputs_are_fresh(case):
    checks.check_outputs_fresh(case)


@pytest.mark.parametrize("case", select(dtypes=FLOAT[-1:], hard=False))
def test_backward_changes_nothing(case):
    checks.check_gradients_kept(case)


@pytest.mark.parametrize("case", plain(dtypes=FLOAT[-1:]))
def test_requires_grad_subsets(case):
    checks.check_requires_grad(case)


def _errors():
    for spec in specs().values():
        for error in spec.errors:
            yield pytest.param(Case(spec, "reference", DTYPES[0], spec.samples[0]), error, id=f"{spec.name}-{error.name}")


@pytest.mark.parametrize("case, error", list(_errors()))
def test_errors(case, error):
    checks.check_error(case, error)


HALF_TOO = DTYPES[1:3]


@pytest.mark.parametrize("case", short(select(dtypes=HALF_TOO, hard=False), TYPICAL) + plain(levels="lower", dtypes=HALF_TOO, first=2))
def test_deterministic(case):
    checks.check_deterministic(case, 5 if INTERPRETED else 15)


@pytest.mark.parametrize("case", one_per_op(DTYPES[1]))
def test_deterministic_over_100_runs(case):
    checks.check_deterministic(case, 10 if INTERPRETED else 100)


@pytest.mark.slow
@pytest.mark.parametrize("case", select(levels="all", empty=False))
def test_deterministic_over_100_runs_of_all_samples(case):
    checks.check_deterministic(case, 100)


INDEPENDENT = plain(dtypes=HALF_TOO, kernels_only=True) + plain(levels="lower", dtypes=HALF_TOO, first=3)


@pytest.mark.parametrize("case", INDEPENDENT)
def test_thread_invariant(case):
    checks.check_thread_invariant(case)


@pytest.mark.parametrize("case", [p for p in INDEPENDENT if p.values[0].spec.rows])
def test_batch_invariant(case):
    checks.check_batch_invariant(case, (1, 3) if INTERPRETED else (1, 2, 3, 8, 33))


@pytest.mark.parametrize("case", [p for p in INDEPENDENT if p.values[0].spec.rows])
def test_row_poison(case):
    checks.check_row_poison(case)


@pytest.mark.parametrize("case", one_per_op(kernels_only=True))
def test_nothing_stays_alive(case):
    checks.check_no_leak(case)
