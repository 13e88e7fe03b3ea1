"""The CUDA host functions (<op>_cuda.cpp) on CPU tensors: through the real dispatcher, over the PTX simulator.

The files are compiled unchanged, except that they register in the namespace ``dl4ds_sim`` under the CPU key and that the few
functions of torch's CUDA part are replaced (_cuda_stand_ins.cpp). So checks, output strides, hidden copies and launches are
those of a GPU run.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _cuda_launch as cuda
import torch
from ptxsim import build, toolchain
from ptxsim import library as core

OPS = ("bn_act", "add_act", "conv_bn_act", "nms")
FUNCTIONS = (
    "bn_act",
    "bn_act_bwd",
    "bn_act_apply_bwd",
    "bn_act_pair",
    "bn_act_pair_bwd",
    "bn_stats",
    "add_act",
    "add_act_bwd",
    "bn_act_conv",
    "bn_act_conv_route",
    "conv_bn_act",
    "conv_bn_act_dgrad_bwd",
    "conv_bn_act_dgrad_route",
    "conv_bn_act_route",
    "conv_bn_act_tail",
    "conv_bn_act_tail_route",
    "conv_bn_act_train",
    "conv_bn_stats",
    "nms",
    "batched_nms",
    "nms_padded",
)
RENAMED = (
    "aoti_torch_device_type_cuda", "aoti_torch_get_current_cuda_stream", "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard", "aoti_torch_copy_", "aoti_torch_get_data_ptr", "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)  # fmt: skip
EDITS = {"(dl4ds_kernels, CUDA, m)": "(dl4ds_sim, CPU, m)", "aoti_torch_cuda_add_Tensor": "aoti_torch_cpu_add_Tensor"}
TORCH = Path(torch.__file__).parent


def _stand_in(name: str) -> str:
    return "stand_in_" + name.removeprefix("aoti_torch_").removeprefix("torch_c10_")


def _build() -> Path:
    """The shared library, cached by the contents of everything in it."""
    compiler = toolchain.cxx().split()
    objects, core_folder = list(cuda.objects().values()), build.simulator()
    stand_ins = Path(__file__).with_name("_cuda_stand_ins.cpp")
    sources = [source for op in OPS for source in sorted((cuda.CSRC / "ops" / op).glob("*_cuda.cpp"))]
    flags = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    cuda_include = Path(toolchain.nvcc()).resolve().parents[1] / "include"
    flags += [f"-I{cuda.CSRC}", "-isystem", f"{TORCH}/include", "-isystem", str(cuda_include)]
    renames = [f"-D{name}={_stand_in(name)}" for name in RENAMED]
    headers = sorted(cuda.CSRC.glob("**/*.h"))
    key = build.digest(
        stand_ins, *sources, *headers, *objects, *flags, *renames, repr(EDITS), torch.__version__, str(core_folder)
    )

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> str:
            text = source.read_text()
            for old, new in EDITS.items():
                text = text.replace(old, new)
            (folder / source.name).write_text(text)
            target = f"{folder / source.stem}.o"
            build.run(
                [*compiler, *flags, *(renames if source != stand_ins else []), "-c", str(folder / source.name), "-o", target]
            )
            return target

        with ThreadPoolExecutor(2) as pool:
            compiled = list(pool.map(compile_one, [stand_ins, *sources]))
        link = ["-shared", "-Wl,-Bsymbolic", "-o", str(folder / "libhost.so"), *compiled, *map(str, objects)]
        libraries = [str(core_folder / "cudart.o"), f"-L{core_folder}", "-lptxsim", f"-L{TORCH}/lib", "-ltorch_cpu"]
        build.run([*compiler, *link, *libraries, f"-Wl,-rpath,{core_folder}:{TORCH}/lib"])

    return build.cached("cuda_host", key, ["libhost.so"], make) / "libhost.so"


class Host:
    """Calls of the CUDA ops on CPU tensors; ``copies`` counts the copies of the last call."""

    def __init__(self) -> None:
        core.library()
        self._definitions = torch.library.Library("dl4ds_sim", "DEF")
        for name in FUNCTIONS:
            schema = str(getattr(torch.ops.dl4ds_kernels, name).default._schema)
            self._definitions.define(schema.split("::", 1)[1])
        self._copies = ctypes.c_int.in_dll(ctypes.CDLL(str(_build())), "stand_in_copies")
        self.copies = 0

    def __call__(self, name: str, *args: Any) -> Any:
        core.set_options()
        core.library().ptxsim_clear()
        core.take_results()
        self._copies.value = 0
        try:
            return getattr(torch.ops.dl4ds_sim, name)(*args)
        finally:
            self.copies = self._copies.value
            results = core.take_results()
            core.library().ptxsim_clear()
            problems = [str(f) for r in results for f in r["findings"]] + [r["stopped"] for r in results if r["stopped"]]
            assert not problems, problems[:3]


@functools.cache
def host() -> Host:
    return Host()
