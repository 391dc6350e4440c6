"""Builds memkernels._C (and memkernels._C_cuda when nvcc is found) with ninja; neither links or includes torch.

A missing or failing compiler leaves a pure Python package; memkernels/_build_info.json records what was built and why the rest was not.
Environment: MEMKERNELS_BUILD=require|none, MEMKERNELS_CUDA=0, MEMKERNELS_CUDA_ARCHS="80;90a;100", MEMKERNELS_SANITIZE=address,undefined,
CXX, MAX_JOBS.
"""

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2"
ISA_FLAGS = {
    # On x86 only machines without AVX2 run this level, and it would be a third of the build at -O3.
    "baseline": "-O1" if platform.machine().lower() in ("x86_64", "amd64") else "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "amx": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16",
}
# No contraction: one element gives the same bits wherever it lies in a loop. Kernels ask for fma by name.
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
# gcc 12 warns inside its own AVX-512 header; clang does not know that warning.
ISA_WARNINGS = "-Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized"
X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildSkipped(Exception):
    """The reason why an extension is not built."""


def run(command, **kwargs):
    return subprocess.run(command, check=True, **kwargs)


def find_compiler():
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise BuildSkipped(f"no C++ compiler found (looked for {', '.join(candidates)}; set CXX)")


def find_ninja():
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.exists():
            return str(path)
    except ImportError:
        pass
    if path := shutil.which("ninja"):
        return path
    raise BuildSkipped("ninja not found")


def includes(folder, *more):
    import pybind11

    system = (pybind11.get_include(), sysconfig.get_path("include"), *more)
    return " ".join(f"-isystem {shlex.quote(os.path.realpath(path))}" for path in system) + f" -I{os.path.relpath(CSRC, folder)}"


def jobs():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("MAX_JOBS", cores)))


def optimisation():
    sanitize = os.environ.get("MEMKERNELS_SANITIZE", "")
    if not sanitize:
        return "-O3 -DNDEBUG", "", "release"
    flags = f"-fsanitize={sanitize} -fno-omit-frame-pointer -g"
    return f"-O1 {flags}", flags, "sanitize-" + sanitize.replace(",", "-")


def supported_levels(compiler):
    """The ISA levels whose flags this compiler accepts; other machines than x86 have only the baseline."""
    levels = ["baseline"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        for level in ("avx2", "avx512", "amx") if X86 else ():
            command = [*shlex.split(compiler), *shlex.split(ISA_FLAGS[level]), "-fsyntax-only", str(source)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                levels.append(level)
    return levels


def quote(path):
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_folder(name):
    """Where objects live. pip's isolated environments get their own: their header paths change with every build."""
    import pybind11

    isolated = "-isolated" if "pip-build-env" in pybind11.__file__ else ""
    return ROOT / "build" / f"{name}-{sysconfig.get_config_var('SOABI')}{isolated}"


class NinjaFile:
    """A build.ninja under construction: compile rules by name, one link step."""

    def __init__(self, folder):
        self.folder, self.lines, self.objects = Path(folder), ["ninja_required_version = 1.5"], []
        self.folder.mkdir(parents=True, exist_ok=True)

    def rule(self, name, command, **variables):
        self.lines += [f"rule {name}", f"  command = {command}"] + [f"  {key} = {value}" for key, value in variables.items()]

    def path(self, path):
        """A path as ninja reads it, relative to the folder: a copied tree then finds its copied objects up to date."""
        return quote(os.path.relpath(path, self.folder))

    def compile(self, rule, source, flags=""):
        target = Path("obj") / Path(source).relative_to(CSRC).with_suffix(Path(source).suffix + ".o")
        self.lines += [f"build {quote(target)}: {rule} {self.path(source)}", f"  flags = {flags}"]
        self.objects.append(target)

    def link(self, target, command):
        # Linked beside and moved: a process that has the old module mapped keeps it.
        self.lines += ["rule link", f"  command = {command} -o $out.tmp && mv -f $out.tmp $out"]
        self.lines += [f"build {self.path(target)}: link {' '.join(quote(o) for o in self.objects)}", ""]

    def build(self, verbose):
        path = self.folder / "build.ninja"
        text = "\n".join(self.lines)
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            command = [find_ninja(), "-C", str(self.folder), "-j", str(jobs()), "-k", "0"] + (["-v"] if verbose else [])
            result = subprocess.run(command)
        if result.returncode:
            raise BuildSkipped(f"compilation failed (ninja in {self.folder})")


def build_cpu(target, verbose):
    compiler = find_compiler()
    optimise, link_flags, kind = optimisation()
    emulated = ""  # csrc/cpu/amx/tiles.h
    if os.environ.get("MEMKERNELS_EMULATE_AMX", "0") != "0":
        emulated, kind = "-DMK_EMULATE_AMX=1", f"{kind}-emulated-amx"
    levels = supported_levels(compiler)
    defines = " ".join(f"-DMK_HAVE_{level.upper()}=1" for level in levels)
    ninja = NinjaFile(build_folder(f"cpu-{kind}"))
    flags = f"{optimise} {COMMON_FLAGS} {defines} {includes(ninja.folder)} {os.environ.get('CXXFLAGS', '')}"
    ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {flags} $flags -c $in -o $out", deps="gcc", depfile="$out.d", description="CXX $out")
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "common").glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]
    for source in sources:
        ninja.compile("cxx", source, emulated if source.name == "cpu_features.cpp" else "")
    for level in levels:
        for source in sorted((CSRC / "cpu" / level).glob("*.cpp")):
            more = f" {emulated}" if emulated and level == "amx" else ""
            ninja.compile("cxx", source, f"{ISA_FLAGS[level]} {ISA_WARNINGS} -DMK_LEVEL={level}{more}")
    extra = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--exclude-libs,ALL"
    ninja.link(target, f"{compiler} -shared {link_flags} {extra} $in")
    ninja.build(verbose)
    version = run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    named = [f"{level} (emulated)" if emulated and level == "amx" else level for level in levels]
    return {"built": True, "levels": named, "compiler": version, "kind": kind}


def find_cuda():
    """(nvcc, toolkit root) of the CUDA toolkit, by CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if not nvcc:
        raise BuildSkipped("no CUDA toolkit found (nvcc on PATH or CUDA_HOME)")
    if not home:  # nvcc on PATH may be a wrapper script: ask it where it lives
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.split("TOP=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line]
        home = tops[0] if tops else str(Path(nvcc).resolve().parent.parent)
    return nvcc, Path(home).resolve()


def gencode(nvcc):
    known = run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    wanted = [arch for arch in os.environ.get("MEMKERNELS_CUDA_ARCHS", "80;90a;100").replace(",", ";").split(";") if arch]
    archs = [arch for arch in wanted if "sm_" + arch.rstrip("af") in known]
    if not archs:
        raise BuildSkipped(f"nvcc knows none of the architectures {wanted}")
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()] or [archs[0].rstrip("af")]
    newest = max(portable, key=int)
    return " ".join([*flags, f"-gencode arch=compute_{newest},code=compute_{newest}"]), archs


def build_cuda(target, verbose):
    if os.environ.get("MEMKERNELS_CUDA") == "0":
        raise BuildSkipped("skipped by MEMKERNELS_CUDA=0")
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    if not (CSRC / "cuda" / "bindings.cpp").exists() or not kernels:
        raise BuildSkipped("no CUDA sources in csrc/cuda")
    compiler, (nvcc, home) = find_compiler(), find_cuda()
    codes, archs = gencode(nvcc)
    ninja = NinjaFile(build_folder("cuda"))
    include = includes(ninja.folder, home / "include")
    cxx = f"{compiler} -MMD -MF $out.d -O2 {COMMON_FLAGS} {include} $flags -c $in -o $out"
    ninja.rule("cxx", cxx, deps="gcc", depfile="$out.d", description="CXX $out")
    host = "-fPIC,-fvisibility=hidden"
    cuda = f"{nvcc} -ccbin {compiler} -MD -MF $out.d -O3 -std=c++17 --threads 1 -Xcompiler {host} {codes} {include} $flags -c $in -o $out"
    ninja.rule("nvcc", cuda, deps="gcc", depfile="$out.d", description="NVCC $out")
    for source in sorted((CSRC / "cuda").glob("*.cpp")):
        ninja.compile("cxx", source)
    for source in kernels:
        ninja.compile("nvcc", source)
    libraries = " ".join(f"-L{home / folder}" for folder in ("lib64", "lib") if (home / folder).exists())
    ninja.link(target, f"{compiler} -shared -Wl,--exclude-libs,ALL $in {libraries} -lcudart_static -lrt -ldl -lpthread")
    ninja.build(verbose)
    version = run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    return {"built": True, "archs": archs, "compiler": version}


class NinjaBuild(build_ext):
    """build_ext whose two extensions are each built by one ninja run, or skipped with a recorded reason."""

    builders = {"_C": build_cpu, "_C_cuda": build_cuda}  # noqa: RUF012

    def package_dir(self):
        return ROOT / "memkernels" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "memkernels"

    def run(self):
        mode, info = os.environ.get("MEMKERNELS_BUILD", ""), {}
        package = self.package_dir()
        package.mkdir(parents=True, exist_ok=True)
        for name, builder in self.builders.items():
            target = package / f"{name}{EXT_SUFFIX}"
            try:
                if mode == "none":
                    raise BuildSkipped("skipped by MEMKERNELS_BUILD=none")
                if sys.platform == "win32":
                    raise BuildSkipped("not supported on Windows")
                info[name] = builder(target, bool(os.environ.get("MEMKERNELS_VERBOSE")))
            except (BuildSkipped, OSError, subprocess.CalledProcessError, ImportError) as error:
                info[name] = {"built": False, "reason": str(error)}
                broken = name == "_C" or "compilation failed" in str(error)
                if mode == "require" and broken:
                    raise SystemExit(f"memkernels: {name} was required but not built: {error}") from error
                if broken and mode != "none":
                    print(f"WARNING: memkernels: {name} is NOT built, the package falls back to slower backends: {error}", file=sys.stderr)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def get_outputs(self):
        package = self.package_dir()
        names = [*(f"{name}{EXT_SUFFIX}" for name in self.builders), "_build_info.json"]
        return [str(package / name) for name in names if (package / name).exists()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]

    def copy_extensions_to_source(self):
        pass


setup(
    ext_modules=[Extension(f"memkernels.{name}", sources=[]) for name in NinjaBuild.builders],
    cmdclass={"build_ext": NinjaBuild},
)
