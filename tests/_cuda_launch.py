"""Runs the shipped CUDA launchers on the PTX simulator, on CPU tensors of any strides.

The .cu files are those of the build, or compiled with the project's flags (cached). The Params structs are filled from their
headers, and every launch must be clean: no access out of bounds, no race, no unwritten output.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _cuda_built import built_objects, ptx_in
from ptxsim import Arr, Headers, HostLibrary, Report, Session, compile_cuda
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = [CSRC / "ops" / op / f"{op}_{way}.cu" for op in ("bn_act", "add_act") for way in ("fwd", "bwd")]
SOURCES += [CSRC / "ops" / "bn_act" / f"bn_act_pair_{way}.cu" for way in ("fwd", "bwd", "sums")]
SOURCES += [CSRC / "ops" / "nms" / "nms_fwd.cu", *sorted((CSRC / "ops" / "conv_bn_act").glob("*.cu"))]


def cutlass() -> str | None:
    """The folder that holds cutlass/cutlass.h: CUTLASS_PATH, or the PyPI package nvidia-cutlass."""
    if "CUTLASS_PATH" in os.environ:
        return os.environ["CUTLASS_PATH"]
    spec = importlib.util.find_spec("cutlass_library")
    return str(Path(spec.origin).parent / "source" / "include") if spec and spec.origin else None


# Without CUTLASS the fused convolution's files compile to launchers that refuse, as in a build.
FLAGS = ("-DNDEBUG", "--expt-relaxed-constexpr", *(("-isystem", cutlass()) if cutlass() else ()))
FEW_BLOCKS = 2  # of the build whose loops take several steps on small tensors
DTYPES = {torch.float32: "kFloat32", torch.float64: "kFloat64", torch.float16: "kFloat16", torch.bfloat16: "kBFloat16"}


def compiled(sources: Sequence[Path], flags: tuple[str, ...]) -> list[Path]:
    """.cu files with host code and PTX, compiled two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compile_cuda(source, "object", includes=[CSRC], flags=flags)[0], sources))


@functools.cache
def objects() -> dict[Path, Path]:
    """The object of each .cu file: that of the build if there is one of these flags, else compiled (minutes)."""
    return dict(zip(SOURCES, built_objects(SOURCES, FLAGS) or compiled(SOURCES, FLAGS), strict=True))


@functools.cache
def ptx_of(source: Path) -> str:
    """The PTX of a .cu file, as the host library embeds it."""
    return ptx_in(objects()[source])


@functools.cache
def shipped() -> HostLibrary:
    """All launchers over the stand-in runtime."""
    return HostLibrary(list(objects().values()))


@functools.cache
def few_blocks() -> HostLibrary:
    """The same with the largest grid of grid-stride loops set to FEW_BLOCKS; the kernels' PTX does not depend on it.

    A convolution's grid has a block for every tile: its files need no other build.
    """
    walking = [source for source in SOURCES if source.parent.name != "conv_bn_act"]
    small = compiled(walking, (*FLAGS, f"-DDL4DS_MAX_BLOCKS={FEW_BLOCKS}"))
    return HostLibrary(list((objects() | dict(zip(walking, small, strict=True))).values()))


_library = shipped


def library() -> HostLibrary:
    """The launchers that the functions below call."""
    return _library()


@contextmanager
def small_grids() -> Iterator[None]:
    """Inside, launches go through few_blocks()."""
    global _library
    _library = few_blocks
    try:
        yield
    finally:
        _library = shipped


@functools.cache
def headers(op: str) -> Headers:
    return Headers(CSRC / "ops" / op / f"{op}.h", CSRC)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def suggested(x: Tensor) -> torch.memory_format:
    if x.dim() in (4, 5) and torch._prims_common.suggest_memory_format(x) != torch.contiguous_format:
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def memory_order(t: Tensor) -> Tensor:
    """The values of a dense tensor as they lie in memory."""
    return t.as_strided((t.numel(),), (1,))


class Launch:
    """One session of launches: turns tensors into Params members and keeps the reports."""

    def __init__(self, op: str, session: Session, way: str) -> None:
        self.session, self.op, self.way = session, op, way
        self.struct = "".join(word.capitalize() for word in op.split("_")) + way.capitalize() + "Params"

    def pointer(self, t: Tensor | None, name: str, **kind: bool) -> int:
        if t is None or t.numel() == 0:
            return 0
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return self.session.pointer(Arr(whole, name, **kind)) + t.storage_offset() * t.element_size()

    def read(self, t: Tensor | None, name: str) -> int:
        return self.pointer(t, name, read_only=True)

    def channels(self, t: Tensor | None, name: str) -> dict[str, Any]:
        return {"data": self.read(t, name), "dtype": DTYPES[t.dtype]} if t is not None else {}

    def make(self, **members: Any) -> ctypes.Structure:
        return headers(self.op).make(self.struct, lambda value: value, **members)

    def workspace(self, params: ctypes.Structure) -> Tensor:
        """Sets params.workspace to the bytes that the launcher asks for."""
        size = self.session.call(f"{self.op}_{self.way}_workspace", params, restype=ctypes.c_int64)
        memory = torch.empty(size, dtype=torch.uint8)
        params.workspace = self.pointer(memory, "workspace", scratch=True)
        return memory

    def run(self, params: ctypes.Structure) -> list[Report]:
        error = self.session.call(f"launch_{self.op}_{self.way}", params, None)
        assert error == 0, f"launch_{self.op}_{self.way} returned {error}"
        assert not self.session.errors, "\n  ".join(self.session.errors)
        return self.session.reports


def dims(sizes: tuple[int, ...], fill: int = 1) -> dict[str, int]:
    """(N, C, *spatial) as a Dims struct, missing dimensions in front of the last spatial ones."""
    spatial = (fill,) * (5 - len(sizes)) + tuple(sizes[2:])
    return dict(zip("ncdhw", (*sizes[:2], *spatial), strict=True))


def bn_act_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_std: bool = False,
    negative_slope: float = 0.1,
    save_mask: bool = False,
    inplace: bool = False,
    options: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], list[Report]]:
    """Results out, mean, rstd, mask, new_running_mean, new_running_var and the reports of the kernels."""
    acc, channels = accumulator(x), x.shape[1]
    results = {"out": x if inplace else torch.empty_like(x, memory_format=suggested(x))}
    if training:
        results |= {name: torch.empty(channels, dtype=acc) for name in ("mean", "rstd")}
        if running_mean is not None and running_var is not None:
            results |= {"new_running_mean": torch.empty_like(running_mean), "new_running_var": torch.empty_like(running_var)}
    if save_mask:
        results["mask"] = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    with library().session(**(options or {})) as session:
        launch = Launch("bn_act", session, "fwd")
        out = launch.pointer(x, "x") if inplace else 0
        params = launch.make(
            dtype=DTYPES[x.dtype],
            channels_last=suggested(x) != torch.contiguous_format,
            size=dims(x.shape),
            x_strides=dims(x.stride()),
            residual_strides=dims(x.stride() if residual is None else residual.stride()),
            x=out or launch.read(x, "x"),
            residual=launch.read(residual, "residual"),
            weight=launch.channels(weight, "weight"),
            bias=launch.channels(bias, "bias"),
            running_mean=launch.channels(running_mean, "running_mean"),
            running_var=launch.channels(running_var, "running_var"),
            training=training,
            eps_std=eps_std,
            momentum=momentum,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            **{k: out if k == "out" and inplace else launch.pointer(v, k, output=True) for k, v in results.items()},
        )
        assert session.call("bn_act_fwd_reads", params, restype=ctypes.c_bool), "the kernels can't read these strides"
        memory = launch.workspace(params)
        reports = launch.run(params)
        del memory
    return results, reports


def bn_act_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: int,
    *,
    training: bool = True,
    eps: float = 1e-5,
    eps_std: bool = False,
    negative_slope: float = 0.1,
    needs: tuple[str, ...] = ("dx", "dweight", "dbias", "dresidual"),
    options: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], list[Report]]:
    """The results named in ``needs`` and the reports of the kernels."""
    like_x = functools.partial(torch.empty_like, x, memory_format=suggested(x))
    vector = functools.partial(torch.empty, x.shape[1], dtype=accumulator(x))
    results = {name: vector() if name in ("dweight", "dbias") else like_x() for name in needs}
    with library().session(**(options or {})) as session:
        launch = Launch("bn_act", session, "bwd")
        params = launch.make(
            dtype=DTYPES[x.dtype],
            channels_last=suggested(x) != torch.contiguous_format,
            size=dims(x.shape),
            dout_strides=dims(dout.stride()),
            x_strides=dims(x.stride()),
            residual_strides=dims(x.stride() if residual is None else residual.stride()),
            **{
                name: launch.read(t, name)
                for name, t in {"dout": dout, "x": x, "residual": residual, "mask": mask, "mean": mean, "rstd": rstd}.items()
            },
            weight=launch.channels(weight, "weight"),
            bias=launch.channels(bias, "bias"),
            training=training,
            eps_std=eps_std,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            **{name: launch.pointer(t, name, output=True) for name, t in results.items()},
        )
        assert session.call("bn_act_bwd_reads", params, restype=ctypes.c_bool), "the kernels can't read these strides"
        memory = launch.workspace(params)
        reports = launch.run(params)
        del memory
    return results, reports


def add_act_fwd(
    x: Tensor, residual: Tensor, alpha: float, activation: int, slope: float, save_mask: bool, **options: int
) -> tuple[Tensor, Tensor | None, list[Report]]:
    """(out, mask, reports) of dense tensors in one memory order."""
    out = torch.empty_like(x)
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8) if save_mask else None
    with library().session(**options) as session:
        launch = Launch("add_act", session, "fwd")
        params = launch.make(
            dtype=DTYPES[x.dtype], numel=x.numel(), x=launch.read(x, "x"), residual=launch.read(residual, "residual"),
            alpha=alpha, activation=activation, negative_slope=slope,
            out=launch.pointer(out, "out", output=True), mask=launch.pointer(mask, "mask", output=True),
        )  # fmt: skip
        return out, mask, launch.run(params)


def add_act_bwd(
    dout: Tensor, mask: Tensor | None, x: Tensor | None, residual: Tensor | None, alpha: float, activation: int, slope: float,
    **options: int,
) -> tuple[Tensor, list[Report]]:  # fmt: skip
    """(dx, reports)."""
    dx = torch.empty_like(dout)
    inputs = {"dout": dout, "mask": mask, "x": x, "residual": residual}
    with library().session(**options) as session:
        launch = Launch("add_act", session, "bwd")
        params = launch.make(
            dtype=DTYPES[dout.dtype], numel=dout.numel(), alpha=alpha, activation=activation, negative_slope=slope,
            dx=launch.pointer(dx, "dx", output=True), **{name: launch.read(t, name) for name, t in inputs.items()},
        )  # fmt: skip
        return dx, launch.run(params)
