"""ring_attention on gloo: the checks run in processes of their own (tests/ring.py)."""

import pytest
import ring
import torch

from memkernels.distributed import ring_attention

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("size", "checks"),
    [
        (2, [ring.check_sequences, ring.check_layouts, ring.check_errors]),
        (4, [ring.check_sequences, ring.check_groups]),
    ],
)
def test_ranks(size, checks, tmp_path):
    ring.spawn(checks, size, tmp_path / "store")


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"ring_attention: group: expected an initialised process group .*got none"):
        ring_attention(*[torch.zeros(1, 1, 2, 4)] * 3)
