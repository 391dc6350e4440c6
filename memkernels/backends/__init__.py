"""One package per backend; none imports another. Calling the package, `memkernels.backends()`, lists them."""

from __future__ import annotations

import sys
from types import ModuleType


class _Callable(ModuleType):
    """`memkernels.backends` is this folder and the public function at once, so the module itself is callable."""

    def __call__(self) -> dict[str, str | None]:
        """Every backend with None when it is there, or with the reason why it is not."""
        from memkernels._backends import backends

        return backends()


sys.modules[__name__].__class__ = _Callable
