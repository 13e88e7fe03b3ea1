"""What bench/roofline.py asks for: counts of counts.py at the grids of real sizes, convolutions (sites_conv.py), NMS and LRN.

`python -m ptxsim.sites '{"sites": …}'` (with tests/ on the path) prints it all as JSON.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _cuda_launch as launchers
import _cuda_pair as pair
import torch

from ptxsim import Module
from ptxsim.counts import RELU, kernels, ptx_of
from ptxsim.sites_conv import convolutions, gradients, tails


@functools.cache
def _returning(source: Path) -> Module:
    """The module of a file with kernels that return at once."""
    return Module(re.sub(r"\n\{\n.*?\n\}\n", "\n{\n\tret;\n}\n", ptx_of(source), flags=re.DOTALL))


def grids(
    op: str, way: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int], **members: Any
) -> dict[str, Any]:
    """Blocks of every kernel that a launcher launches for x of this shape (no memory is touched), and bytes of workspace.

    members: of the Params struct; pointers are made up.
    """
    n, c, h, w = shape
    address = 1 << 20
    source = launchers.CSRC / "ops" / op / f"{op}_{way}.cu"
    module = _returning(source)
    with ExitStack() as stack:
        for kernel in module.kernels:
            stack.enter_context(module.replacing(kernel))
        session = stack.enter_context(launchers.library().session(traffic=0, races=0))
        launch = launchers.Launch(op, session, way)
        if op == "add_act":
            params = launch.make(dtype=launchers.DTYPES[dtype], numel=n * c * h * w, **members)
        else:
            strides = (h * w * c, 1, w * c, c) if layout == "nhwc" else (c * h * w, h * w, w, 1)
            operands = ("x", "residual") if way == "fwd" else ("dout", "x", "residual")
            params = launch.make(
                dtype=launchers.DTYPES[dtype], channels_last=layout == "nhwc", size=launchers.dims(shape),
                **{f"{name}_strides": launchers.dims(strides) for name in operands}, **members,
            )  # fmt: skip
        workspace = 0
        if op == "bn_act":
            workspace = session.call(f"{op}_{way}_workspace", params, restype=ctypes.c_int64)
            params.workspace = address
        error = session.call(f"launch_{op}_{way}", params, None)
        assert error == 0, f"launch_{op}_{way} returned {error}"
        blocks = {re.search(r"((?:bn|add)_act_\w*kernel(?:_n\w\w\w)?)", r.kernel).group(1): r.grid[0] for r in session.reports}
        return {
            "blocks": blocks,
            "workspace": workspace,
            "threads": {k: session.reports[i].block[0] for i, k in enumerate(blocks)},
        }


def pair_grids(dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]) -> tuple[dict[str, int], int]:
    """Blocks of the kernels of bn_act_pair, as grids(), and bytes of the workspace of its sums."""
    address, blocks, workspace = 1 << 20, {}, 0
    vector = {"data": address, "dtype": "kFloat32"}
    norm = {"mean": address, "rstd": address, "weight": vector, "bias": vector, "dweight": address}
    statistics = [prefix + name for prefix in ("", "residual_") for name in ("mean", "rstd", "dweight")]
    maps = {
        "fwd": ("x", "residual", "out", "mask"), "bwd": ("dout", "x", "residual", "mask", "dbias", "dx", "dresidual"),
        "sums": ("dout", "x", "residual", "mask", "dbias", *statistics),
    }  # fmt: skip
    for way, names in maps.items():
        with ExitStack() as stack:
            module = _returning(launchers.CSRC / "ops" / "bn_act" / f"bn_act_pair_{way}.cu")
            for kernel in module.kernels:
                stack.enter_context(module.replacing(kernel))
            session = stack.enter_context(launchers.library().session(traffic=0, races=0))
            params = pair.headers().make(
                f"BnActPair{way.capitalize()}Params", lambda value: value, dtype=launchers.DTYPES[dtype],
                channels_last=layout == "nhwc", size=launchers.dims(shape), activation=RELU, workspace=address,
                **dict.fromkeys(names, address), **({} if way == "sums" else {"norm": norm, "residual_norm": norm}),
            )  # fmt: skip
            if way == "sums":
                workspace = session.call("bn_act_pair_sums_workspace", params, restype=ctypes.c_int64)
            assert session.call(f"launch_bn_act_pair_{way}", params, None) == 0
            blocks |= {
                re.search(r"(bn_act_pair_\w*kernel(?:_n\w\w\w)?)", r.kernel).group(1): r.grid[0] for r in session.reports
            }
    return blocks, workspace


def site_grids(dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Of all kernels of bn_act (forward and backward in training) and add_act at one site."""
    address = 1 << 20
    vector = {"data": address, "dtype": "kFloat32"}
    some = {"x": address, "weight": vector, "bias": vector, "activation": RELU, "training": True}
    forward = grids(
        "bn_act", "fwd", dtype, layout, shape, out=address, mean=address, rstd=address, running_mean=vector,
        running_var=vector, new_running_mean=address, new_running_var=address, **some,
    )  # fmt: skip
    back = {"dout": address, "dx": address, "dweight": address, "dbias": address, "mean": address, "rstd": address}
    backward = grids("bn_act", "bwd", dtype, layout, shape, **back, **some)
    added = grids("add_act", "fwd", dtype, layout, shape, x=address, residual=address, out=address, activation=RELU)
    paired, sums = pair_grids(dtype, layout, shape)
    taken = grids("add_act", "bwd", dtype, layout, shape, dout=address, mask=address, dx=address, activation=RELU)
    return {
        "blocks": {
            **forward["blocks"],
            **backward["blocks"],
            **added["blocks"],
            **taken["blocks"],
            **paired,
        },
        "workspace": {"fwd": forward["workspace"], "bwd": backward["workspace"], "sums": sums},
    }


# ------------------------------------------------------------------------------------------------------------------ NMS, LRN


def boxes() -> list[dict[str, Any]]:
    """NMS of 1,024 and 4,096 boxes in fp32, kernel by kernel, as simulated: they are bound by latency and arithmetic."""
    from ptxsim.gates import cuda as backend
    from ptxsim.gates import workload

    found = []
    for case in workload.cases("nms", torch.float32):
        if not case.even or not backend.chosen(case):
            continue
        for report in backend.run(case)[1]:
            c = report.counters
            found.append({
                "call": case.name, "kernel": backend.stem(report.kernel), "blocks": report.grid[0], "threads": report.block[0],
                "ptx": c["warp_instructions"], "moved": 32 * (c["load_sectors"] + c["store_sectors"]),
                "distinct": sum(t["read"] + t["written"] for t in report.tensors.values()), "barriers": c["barriers"],
            })  # fmt: skip
    return found


def windows() -> list[dict[str, Any]]:
    """local_response_norm's Triton kernels at the even sizes of the gates; needs a process in which Triton compiles."""
    from ptxsim.gates import triton as backend
    from ptxsim.gates import workload

    found = []
    for dtype in (torch.float16, torch.float32):
        for case in workload.cases("local_response_norm", dtype):
            if not case.even:
                continue
            for report in backend.run(case)[1]:
                c, elements = report.counters, case.arguments["x"].numel()
                found.append({
                    "kernel": backend.stem(report.kernel), "layout": case.name.split("-")[2], "dtype": str(dtype)[6:],
                    "warps": report.grid[0] * report.block[0] / 32 / elements, "ptx": c["warp_instructions"] / elements,
                    "moved": 32 * (c["load_sectors"] + c["store_sectors"]) / elements,
                    "distinct": sum(t["read"] + t["written"] for t in report.tensors.values()) / elements,
                })  # fmt: skip
    return found


def collect(sites: list[list[int]], dtypes: list[str], layouts: list[str], names: list[str]) -> dict[str, Any]:
    """Everything that bench/roofline.py asks for; sites: (N, C, H, W)."""
    start = time.time()
    kinds = tuple(getattr(torch, name) for name in dtypes)
    rows = []
    for row in kernels(kinds, tuple(layouts), tuple(names)):
        rows.append(row)
        print(f"{time.time() - start:4.0f} s: {row['kernel']}, {row['way']}, {row['dtype']}", file=sys.stderr, flush=True)
    found = []
    for dtype, layout in ((d, la) for d in kinds for la in layouts):
        for shape in sites:
            found.append({"dtype": str(dtype)[6:], "layout": layout, "shape": shape, **site_grids(dtype, layout, tuple(shape))})
    print(f"{time.time() - start:4.0f} s: grids of {len(found)} sites", file=sys.stderr, flush=True)
    products = {"convolutions": convolutions(), "gradients": gradients(), "tails": tails()}
    print(f"{time.time() - start:4.0f} s: convolutions", file=sys.stderr, flush=True)
    return {"kernels": rows, "sites": found, **products, "nms": boxes()}


def main() -> int:
    """Reads {sites, dtypes, layouts, names} as JSON (or "windows") from the command line and prints the counts as JSON."""
    asked = sys.argv[1]
    print(json.dumps(windows() if asked == "windows" else collect(**json.loads(asked))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
