"""A folder and a public function of the same name: the package itself is made callable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, load: Callable[[], Callable[..., Any]]) -> None:
    """Calling the module `name` calls what `load()` returns (loaded at the call: the function's module may import this one)."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return load()(*args, **kwargs)

    sys.modules[name].__class__ = CallableModule
