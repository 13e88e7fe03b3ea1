"""Runs the shipped launchers of bn_act_pair on the PTX simulator (tests/_cuda_launch.py)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import _cuda_launch as cuda
import torch
from ptxsim import Headers, Report
from torch import Tensor


class Norm(NamedTuple):
    """A BatchNorm in training; dweight: for the backward pass."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dweight: Tensor | None = None
    eps: float = 1e-5
    eps_std: bool = False


@functools.cache
def headers() -> Headers:
    """The structs of the launchers' header."""
    return Headers(cuda.CSRC / "ops" / "bn_act" / "bn_act_pair.h", cuda.CSRC)


def _norm(launch: cuda.Launch, norm: Norm, prefix: str) -> dict[str, Any]:
    named = {name: t for name, t in norm._asdict().items() if isinstance(t, Tensor)}
    plain = {name: launch.read(named[name], prefix + name) for name in ("mean", "rstd", "dweight") if name in named}
    vectors = {name: launch.channels(named.get(name), prefix + name) for name in ("weight", "bias")}
    return {**plain, **vectors, "eps": norm.eps, "eps_std": norm.eps_std}


def _run(
    way: str, x: Tensor, maps: dict[str, Tensor | None], norms: tuple[Norm, Norm], results: dict[str, Tensor | None],
    options: dict[str, int] | None, **members: Any,
) -> list[Report]:  # fmt: skip
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("bn_act_pair", session, way)
        memory = torch.empty((16 if way == "fwd" else 32) * x.shape[1], dtype=torch.uint8)
        inputs = {name: launch.read(t, name) for name, t in maps.items()}
        vectors = {name: launch.read(t, name) for name, t in members.items() if isinstance(t, Tensor)}
        params = headers().make(
            launch.struct, lambda value: value, dtype=cuda.DTYPES[x.dtype],
            channels_last=cuda.suggested(x) != torch.contiguous_format, size=cuda.dims(x.shape),
            norm=_norm(launch, norms[0], ""), residual_norm=_norm(launch, norms[1], "residual_"),
            workspace=launch.pointer(memory, "workspace", scratch=True), **inputs, **{**members, **vectors},
            **{name: launch.pointer(t, name, output=True) for name, t in results.items()},
        )  # fmt: skip
        return launch.run(params)


def pair_fwd(
    x: Tensor, residual: Tensor, norm: Norm, residual_norm: Norm, activation: int, *, negative_slope: float = 0.1,
    save_mask: bool = False, options: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], list[Report]]:  # fmt: skip
    """out, mask (if it is saved) and the reports; x and residual dense in one order."""
    results = {"out": torch.empty_like(x)}
    if save_mask:
        results["mask"] = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    reports = _run(
        "fwd", x, {"x": x, "residual": residual}, (norm, residual_norm), results, options, activation=activation,
        negative_slope=negative_slope,
    )  # fmt: skip
    return results, reports


def pair_bwd(
    dout: Tensor, mask: Tensor | None, x: Tensor, residual: Tensor, norm: Norm, residual_norm: Norm, dbias: Tensor,
    activation: int, *, negative_slope: float = 0.1, options: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], list[Report]]:  # fmt: skip
    """dx, dresidual and the reports, from sums that are known."""
    results = {"dx": torch.empty_like(x), "dresidual": torch.empty_like(x)}
    maps = {"dout": dout, "x": x, "residual": residual, "mask": mask}
    reports = _run(
        "bwd", x, maps, (norm, residual_norm), results, options, dbias=dbias, activation=activation,
        negative_slope=negative_slope,
    )  # fmt: skip
    return results, reports


def pair_sums(
    dout: Tensor, mask: Tensor | None, x: Tensor, residual: Tensor, norm: Norm, residual_norm: Norm, activation: int, *,
    negative_slope: float = 0.1, options: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], list[Report]]:  # fmt: skip
    """dweight, residual_dweight, dbias and the reports."""
    results = {name: torch.empty(x.shape[1]) for name in ("dweight", "residual_dweight", "dbias")}
    given = {"mean": norm.mean, "rstd": norm.rstd, "residual_mean": residual_norm.mean, "residual_rstd": residual_norm.rstd}
    maps = {"dout": dout, "x": x, "residual": residual, "mask": mask}
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("bn_act_pair", session, "sums")
        params = headers().make(
            launch.struct, lambda value: value, dtype=cuda.DTYPES[x.dtype],
            channels_last=cuda.suggested(x) != torch.contiguous_format, size=cuda.dims(x.shape), activation=activation,
            negative_slope=negative_slope, **{name: launch.read(t, name) for name, t in (maps | given).items()},
            **{name: launch.pointer(t, name, output=True) for name, t in results.items()},
        )  # fmt: skip
        workspace = launch.workspace(params)
        reports = launch.run(params)
        del workspace
    return results, reports
