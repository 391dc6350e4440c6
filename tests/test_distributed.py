"""ring_attention and ShardedMemory on gloo: the checks run in processes of their own (tests/ring.py, tests/sharded.py)."""

import pytest
import ring
import sharded
import torch

from memkernels.distributed import ShardedMemory, ring_attention

pytestmark = pytest.mark.timeout(600)  # 10 s where nothing else runs
SHARDED = [
    sharded.check_content_read,
    sharded.check_topk_read,
    sharded.check_writes,
    sharded.check_modes,
    sharded.check_second_order,
    sharded.check_errors,
]


@pytest.mark.parametrize(
    ("size", "checks"),
    [
        (2, [ring.check_sequences, ring.check_layouts, ring.check_errors, *SHARDED]),
        (4, [ring.check_sequences, ring.check_groups, *SHARDED]),
    ],
)
def test_ranks(size, checks, tmp_path):
    ring.spawn(checks, size, tmp_path / "store")


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"ring_attention: group: expected an initialised process group .*got none"):
        ring_attention(*[torch.zeros(1, 1, 2, 4)] * 3)
    with pytest.raises(RuntimeError, match=r"ShardedMemory: group: expected an initialised process group .*got none"):
        ShardedMemory(torch.zeros(2, 4))
