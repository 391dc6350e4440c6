"""Every op in a package of AOTInductor, which runs without Python and reads the options of an op from a file."""

import shutil

import pytest
import torch
from cases import DTYPES, INTERPRETED, one_per_op
from flat import of_tensors

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_every_op(tmp_path):
    """One package of one call of each op: compiling one for each of them would take minutes."""
    cases = {p.values[0].spec.name: p.values[0] for p in one_per_op(DTYPES[1]) if p.values[0].device == "cpu"}
    calls = [of_tensors(case, case.inputs(), forced=False) for case in cases.values()]

    class Calls(torch.nn.Module):
        def forward(self, *given):
            left = iter(given)
            return [function(*(next(left) for _ in tensors)) for function, tensors in calls]

    given = tuple(t for _, tensors in calls for t in tensors)
    with torch.no_grad():
        wanted = Calls()(*given)
        program = torch.export.export(Calls(), given)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ops.pt2"))
        found = torch._inductor.aoti_load_package(path)(*given)
    torch.testing.assert_close(found, wanted)
