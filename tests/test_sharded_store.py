"""ShardedStore on gloo: the checks run in processes of their own (tests/sharded_store.py)."""

from functools import partial

import pytest
import ring
import sharded_store

from memkernels.distributed import ShardedStore

pytestmark = pytest.mark.timeout(600)  # 40 s a test with four busy loops beside it on two cores
CHECKS = [sharded_store.check_against_a_dict, sharded_store.check_one_column, sharded_store.check_errors]

ON_DISK = [sharded_store.check_other_numbers_of_ranks, sharded_store.check_damage, sharded_store.check_failures]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks(size, tmp_path):
    on_disk = [partial(check, tmp_path / check.__name__) for check in ON_DISK] if size == 4 else []
    ring.spawn([*CHECKS[: 5 - size], *on_disk], size, tmp_path / "group")


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"ShardedStore: group: expected an initialised process group .*got none"):
        ShardedStore(3)
