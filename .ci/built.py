"""CI: both extensions that this machine has compilers for were really built, with everything they promise."""

import json
import shutil
from pathlib import Path

import memkernels

info = json.loads((Path(memkernels.__file__).parent / "_build_info.json").read_text())
print(json.dumps(info, indent=1))
assert info["_C"]["built"], info["_C"]
assert set(info["_C"]["levels"]) == {"baseline", "avx2", "avx512", "amx"}, info["_C"]
assert memkernels.backends()["cpp"] is None, memkernels.backends()
if shutil.which("nvcc"):
    from memkernels import _C_cuda

    assert info["_C_cuda"]["built"] and set(info["_C_cuda"]["archs"]) == {"80", "90a", "100"}, info["_C_cuda"]
    print("imported without a driver:", _C_cuda.__file__)
else:
    print("no nvcc: _C_cuda:", info["_C_cuda"]["reason"])
