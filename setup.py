"""Builds the two compiled parts with ninja; everything else is in pyproject.toml. No network, no GPU needed.
_C     csrc/bindings.cpp and every csrc/**/*_cpu.cpp: pybind11 host facts and the CPU kernels (libtorch stable ABI).
_cuda  every csrc/**/*_cuda.cpp (host compiler) and csrc/**/*.cu (nvcc): only where torch is a CUDA build."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TARGET = "0x020a000000000000"  # torch 2.10: the oldest libtorch stable ABI with what we call (2.11 gives the output pool)
RELEASE_ARCHS = "8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX"
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -DNDEBUG -fstack-protector-strong -fno-math-errno -Wall -W -Wno-psabi"
NVCC_FLAGS = "-O3 -std=c++17 -DNDEBUG -lineinfo --expt-relaxed-constexpr --no-compress -Xcompiler -fPIC"
LINK_FLAGS = "-shared -Wl,-z,relro,-z,now -Wl,--as-needed"
if os.environ.get("SOURCE_DATE_EPOCH"):  # a reproducible build: nvcc's line tables and names of temporary files stay out
    NVCC_FLAGS, LINK_FLAGS = NVCC_FLAGS.replace(" -lineinfo", ""), LINK_FLAGS + " -Wl,-s"


def nvcc_version(home):
    """Release (major.minor) of a toolkit that can compile, None for an incomplete one."""
    if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
        return re.search(r"release (\d+\.\d+)|$", subprocess.getoutput(f"'{home}/bin/nvcc' --version")).group(1)


def cuda_plan():
    """(toolkit or None, its version, why CUDA is skipped): CUDA_HOME if complete, else nvcc from PyPI, else the system's."""
    choice, cuda = os.environ.get("DL4DS_BUILD_CUDA", "auto"), torch.version.cuda
    _ = choice in ("0", "1", "auto") or sys.exit(f"DL4DS_BUILD_CUDA: expected 0, 1 or auto, got {choice!r}")
    if choice == "0" or cuda is None:
        reason = "DL4DS_BUILD_CUDA=0" if choice == "0" else f"torch {torch.__version__} is not a CUDA build"
    else:
        major, spec = cuda.split(".")[0], importlib.util.find_spec("nvidia")
        pypi = [f"{p}/cu{major}" for p in (spec.submodule_search_locations if spec else [])]
        versions = {home: nvcc_version(Path(home)) for home in (os.environ.get("CUDA_HOME"), *pypi, "/usr/local/cuda") if home}
        for home, version in versions.items():
            if version and version.split(".")[0] == major:
                return Path(home), version, None
        found = ", ".join(f"{home}: {f'CUDA {v}' if v else 'no nvcc and headers'}" for home, v in versions.items())
        reason = f"no complete CUDA {major} toolkit for this torch, found {found}: set CUDA_HOME or "
        reason += f"`pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'`"
    _ = choice == "1" and sys.exit(f"DL4DS_BUILD_CUDA=1, but {reason}")
    return None, None, reason


def cutlass_plan():
    """(flags for CUTLASS' headers, version or what is missing): CUTLASS_PATH, else PyPI's nvidia-cutlass. Only for building."""
    spec, named = importlib.util.find_spec("cutlass_library"), os.environ.get("CUTLASS_PATH")
    roots = [named] if named else [Path(spec.origin).parent / "source"] if spec and spec.origin else []
    for header in (path for root in roots for path in Path(root).glob("**/cutlass/version.h")):
        return f"-isystem {header.parents[1]}", ".".join(
            re.findall(r"define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text())
        )
    _ = named and sys.exit(f"CUTLASS_PATH: expected a folder with cutlass/version.h in it or below, got {named}")
    return "", "no headers, no fused CUDA convolution: `pip install --no-deps nvidia-cutlass==4.2.0.0`, or set CUTLASS_PATH"


def gencode(archs):
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0+PTX, got {arch!r}")
        number, kinds = arch.removesuffix("+PTX").replace(".", ""), ("sm", "compute")[: 1 + arch.endswith("+PTX")]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return " ".join(flags)


def max_jobs():  # MAX_JOBS, else what cores and memory allow: 2 GiB a compiler, and the page cache gives way
    free_gib = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) >> 20
    asked = os.environ.get("MAX_JOBS") or str(max(1, min(len(os.sched_getaffinity(0)), free_gib // 2)))
    return int(asked) if asked.strip("0").isdecimal() else sys.exit(f"MAX_JOBS: expected a positive number, got {asked!r}")


class NinjaBuild(build_ext):
    """One build.ninja for both parts, in build/, kept between calls: a rebuild compiles what changed."""

    def build_extensions(self):
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        build = ROOT / "build" / f"cpython-{sys.version_info.major}{sys.version_info.minor}-torch-{torch.__version__}"
        (build / "link").mkdir(parents=True, exist_ok=True)
        cxx, torch_root = os.environ.get("CXX", "g++"), Path(torch.__file__).parent
        _ = shutil.which(cxx.split()[0]) or sys.exit(f"dl4ds_kernels: no C++ compiler {cxx!r} on PATH: install g++, or set CXX")
        systems = (f"{torch_root}/include", sysconfig.get_paths()["include"], pybind11.get_include())
        (home, cuda_version, skipped), (cutlass, cutlass_version) = cuda_plan(), cutlass_plan()
        archs, version = os.environ.get("TORCH_CUDA_ARCH_LIST") or RELEASE_ARCHS, self.distribution.get_version()
        facts = f"'-DDL4DS_VERSION=\"{version}\"' '-DDL4DS_CUDA_ARCHS=\"{archs if home else ''}\"'"
        libs = f"-L{torch_root}/lib -ltorch_cpu -ldl"
        with open(build / "build.ninja", "w") as file:
            n = ninja_syntax.Writer(file, width=120)
            flags = f"-ffile-prefix-map={ROOT}=. {CXX_FLAGS} -DTORCH_TARGET_VERSION={TARGET} -I{ROOT}/csrc -isystem "
            flags += " -isystem ".join(systems)
            n.rule("cxx", f"{cxx} -MMD -MF $out.d {flags} $extra -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{cxx} {LINK_FLAGS} $in -o $out $libraries")
            self.part(n, build, "_C", ("bindings.cpp", "**/*_cpu.cpp"), facts, libs)
            if home:
                nvcc = f"{home}/bin/nvcc -MD -MF $out.d {NVCC_FLAGS} {gencode(archs)} -I{ROOT}/csrc {cutlass}"  # never torch's
                n.rule("nvcc", f"{nvcc} -c $in -o $out", depfile="$out.d", deps="gcc")
                libs += f" -Wl,--version-script={ROOT}/csrc/exports.map -ltorch_cuda -L{self.cudart_link(build, home)} -lcudart"
                self.part(n, build, "_cuda", ("**/*_cuda.cpp", "**/*.cu"), f"-DUSE_CUDA -isystem {home}/include", libs)
        print("dl4ds_kernels: CUDA", f"{cuda_version} for {archs}" if home else f"part skipped: {skipped}")
        if subprocess.run([Path(BIN_DIR) / "ninja", "-C", build, f"-j{max_jobs()}"]).returncode:
            sys.exit("dl4ds_kernels: the build failed; the compiler's messages are above (CXX and MAX_JOBS are honoured)")
        info = {"version": version, "torch": torch.__version__, "stable_abi_target": "2.10", "cuda_version": cuda_version,
            "python": f"CPython {sys.version.split()[0]}", "cuda_archs": home and archs, "cuda_skipped": skipped,
            "cutlass": home and cutlass_version}  # fmt: skip
        self.built = build, home, info
        self.install_parts(Path(self.get_ext_fullpath("dl4ds_kernels._C")).parent)

    def copy_extensions_to_source(self):
        self.install_parts(ROOT / "dl4ds_kernels")

    def part(self, n, build, name, patterns, extra, libraries):
        files = sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))
        rules = {f: "nvcc" if f.endswith(".cu") else "cxx" for f in files}
        objects = [n.build(f"{build}/{f}.o", rules[f], str(ROOT / f), variables={"extra": extra})[0] for f in files]
        n.build(f"{build}/{name}.so", "link", objects, variables={"libraries": libraries})

    def cudart_link(self, build, home):
        """The linker wants libcudart.so; PyPI has libcudart.so.13 only, and site-packages is not ours to write to."""
        found = [p for d in ("lib64", "lib") for p in sorted((home / d).glob("libcudart.so*"))]
        _ = found or sys.exit(f"dl4ds_kernels: no libcudart.so in {home}: `pip install nvidia-cuda-runtime`, or set CUDA_HOME")
        link = build / "link/libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(found[0])
        return link.parent

    def install_parts(self, package):
        """Copy what was built into the wheel or beside the sources; a CUDA part of an earlier build must not stay."""
        build, home, info = self.built
        package.mkdir(parents=True, exist_ok=True)
        for name, wanted in (("_C", True), ("_cuda", home)):
            built, target = build / f"{name}.so", package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            if not (wanted and target.exists() and target.stat().st_mtime_ns == built.stat().st_mtime_ns):
                target.unlink(missing_ok=True)  # never write into a file that a running process has mapped
                _ = wanted and shutil.copy2(built, target)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


setup(ext_modules=[Extension("dl4ds_kernels._C", sources=["csrc/bindings.cpp"])], cmdclass={"build_ext": NinjaBuild})
