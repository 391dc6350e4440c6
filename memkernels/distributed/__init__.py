"""Memories, stores and sequences that lie in shards on the processes of torch.distributed."""

from memkernels.distributed.memory import ShardedMemory
from memkernels.distributed.ring import ring_attention
from memkernels.distributed.store import ShardedStore

__all__ = ["ShardedMemory", "ShardedStore", "ring_attention"]
