"""Makes the modules named in MEMKERNELS_WITHOUT impossible to import, here and in child processes: what a machine without them sees."""

import os
import sys

BLOCKED = frozenset(os.environ.get("MEMKERNELS_WITHOUT", "").split())


class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by MEMKERNELS_WITHOUT)", name=name)


sys.meta_path.insert(0, Blocker)
