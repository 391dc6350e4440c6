"""Memories and sequences that lie in shards on the processes of torch.distributed."""

from memkernels.distributed.memory import ShardedMemory
from memkernels.distributed.ring import ring_attention

__all__ = ["ShardedMemory", "ring_attention"]
