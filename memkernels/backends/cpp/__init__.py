"""CPU kernels: memkernels._C, handed torch's tensor exchange API and thread pool at import. Raises ImportError when it was not built."""

from __future__ import annotations

import torch

from memkernels import _C, _checks, _compat, _config

_C.bind(_compat.dlpack_exchange_api(), _compat.torch_parallel_for_address(), _compat.torch_num_threads_address())
_C.bind_torch(
    *_compat.PLAIN,
    list(_compat.WATCHERS),
    _compat.forward_ad,
    torch.is_grad_enabled,
    _compat.deterministic,
    _compat.empty_strided_cpu,
    _compat.general_empty,
)
_checks.key_of, _compat.call_kind, _compat.empty = _C.tensor_key, _C.call_kind, _C.empty
_compat.integers_fit, _compat.empties, _compat.empty_gradients = _C.integers_fit, _C.empties, _C.empty_gradients
if (_kept := _config.kept_memory()) is not None:
    _C.set_kept_memory(_kept)
if (_level := _config.cpu_level()) is not None:
    _C.set_cpu_level(_level)

release_kept_memory = _C.release_kept_memory


def cpu_level(level: str | None = None) -> str:
    """The instruction-set level in use; with an argument ("auto": the best one), set it first."""
    if level is not None:
        _C.set_cpu_level(level)
    return _C.cpu_level()
