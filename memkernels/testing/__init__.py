"""What tests, fuzz, benchmarks and `memkernels verify` share: specs, input layouts, and the comparison with float64."""

from typing import TYPE_CHECKING

from memkernels.testing.compare import Row, measure, report, verify
from memkernels.testing.inputs import GRADIENT_LAYOUTS, LAYOUTS, draw
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample

if TYPE_CHECKING:
    from memkernels.testing.spec import specs
else:
    from memkernels.testing import specs  # the package, which is callable

__all__ = ["GRADIENT_LAYOUTS", "LAYOUTS", "ErrorCase", "Input", "OpSpec", "Row", "Sample", "draw", "measure", "report", "specs", "verify"]
