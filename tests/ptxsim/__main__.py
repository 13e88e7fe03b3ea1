"""Command line, for a person who debugs a kernel.

`python -m tests.ptxsim run kernel.ptx --kernel add --grid 4 --block 256 --arg f32:1024:rand --arg f32:1024:out --arg i32:1024`
`python -m tests.ptxsim gates --kernel add_act_fwd` runs the mutants of some kernels; `gates --docs FILE` measures everything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from . import Arr, Module, SimulatorError, build

_ARRAYS = {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "i8": np.int8,
    "u8": np.uint8,
    "i32": np.int32,
    "u32": np.uint32,
    "i64": np.int64,
}
_FILLS = ("rand", "zeros", "ones", "arange", "out")


def parse_argument(text: str, index: int, rng: np.random.Generator):
    """`type:value` is a scalar, `type:count:fill` an array; fills but `out` and `zeros` make it read-only."""
    kind, _, rest = text.partition(":")
    if kind not in _ARRAYS:
        raise ValueError(f"{text}: the type is one of {', '.join(_ARRAYS)}")
    dtype = _ARRAYS[kind]
    if ":" not in rest:
        return dtype(float(rest) if kind[0] == "f" else int(rest, 0))
    count, fill = rest.split(":")
    if fill not in _FILLS:
        raise ValueError(f"{text}: the fill is one of {', '.join(_FILLS)}")
    n = int(count)
    if fill == "rand":
        array = rng.standard_normal(n).astype(dtype) if kind[0] == "f" else rng.integers(0, 100, n).astype(dtype)
    else:
        array = {"ones": np.ones, "zeros": np.zeros, "out": np.zeros}.get(fill, np.arange)(n, dtype=dtype)
    return Arr(array, f"arg{index}", read_only=fill in ("rand", "ones", "arange"), output=fill == "out")


def numbers(text: str) -> tuple[int, ...]:
    """`4` or `4,2,1`."""
    return tuple(int(part) for part in text.split(","))


def run(options: argparse.Namespace) -> int:
    """Runs a kernel, prints findings, counters and the profile; 0 if it was clean."""
    path = Path(options.file)
    if path.suffix == ".cu":
        path = build.compile_cuda(path, "ptx", includes=options.include)[0]
    module = Module(path)
    name = module.kernel(options.kernel or "")
    rng = np.random.default_rng(options.seed)
    args = [parse_argument(text, i, rng) for i, text in enumerate(options.arg)]
    report = module.launch(
        name,
        options.grid,
        options.block,
        args,
        smem=options.smem,
        stop=False,
        schedule=options.schedule,
        lazy_copies=not options.eager,
    )
    for error in report.errors:
        print(error)
    print(f"\n{name}: {len(report.errors)} errors")
    print(", ".join(f"{key} {value}" for key, value in report.counters.items() if value))
    for tensor, touched in report.tensors.items():
        print(f"  {tensor}: {touched['read']} bytes read, {touched['written']} written (whole sectors)")
    sources = [options.source] if options.source else [options.file] if options.file.endswith(".cu") else [None]
    print("\n" + report.profile(sources[0]))
    if options.show:
        for arg in args:
            if isinstance(arg, Arr):
                print(arg.name, arg.array[: options.show])
    return 1 if report.errors else 0


def unsupported(options: argparse.Namespace) -> int:
    """Lists the instructions of a file that the simulator can't execute; 0 if there are none."""
    problems = Module(Path(options.file)).unsupported()
    print("\n".join(problems) or "everything is supported")
    return 1 if problems else 0


def gates(options: argparse.Namespace) -> int:
    """Runs the gates of the project's kernels; 0 if all are met."""
    # The launchers of the project's tests know this package as `ptxsim`; under two names it would have every class twice.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    names = ("checks", "rows", "table", "workload")
    checks, rows, table, workload = (importlib.import_module(f"ptxsim.gates.{name}") for name in names)

    if options.measure:
        rows.until = options.until
        print(json.dumps(table.measured(importlib.import_module(f"ptxsim.gates.{options.measure}"))))
        return 0
    if options.docs:
        start, share = time.time(), {"cuda": 0.5, "triton": 1.0}  # of the time, at the end of each
        parts = {name: table.collect(name, start + 60 * options.minutes * end) for name, end in share.items()}
        page = table.render(parts)
        Path(options.docs).write_text(page)
        print(page)
        return int("Not met" in page)
    backend = importlib.import_module(f"ptxsim.gates.{options.backend}")
    failed = 0
    for op in backend.OPS:
        for dtype in workload.DTYPES:
            for kernel in rows.kernels(backend, op, dtype):
                if options.kernel in backend.short(kernel):
                    verdict = checks.mutants(backend, kernel)
                    print(verdict, flush=True)
                    failed += bool(verdict.open)
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptxsim", description="Run GPU kernels without a GPU.")
    commands = parser.add_subparsers(required=True)
    r = commands.add_parser("run", help="run one kernel of a .ptx or .cu file and report")
    r.add_argument("file")
    r.add_argument("--kernel", help="a part of its name; may be left out if there is only one")
    r.add_argument("--grid", type=numbers, default=(1,))
    r.add_argument("--block", type=numbers, default=(32,))
    r.add_argument("--arg", action="append", default=[], help="type:value, or type:count:" + "|".join(_FILLS))
    r.add_argument("--smem", type=int, default=0, help="bytes of dynamic shared memory")
    r.add_argument("--schedule", type=int, default=0, help="seed of the block and warp order")
    r.add_argument("--eager", action="store_true", help="deliver cp.async at once instead of at the wait")
    r.add_argument("--source", help="source file whose lines to print beside the profile")
    r.add_argument("--include", action="append", default=[], help="include folder for .cu files")
    r.add_argument("--seed", type=int, default=0, help="seed of random arrays")
    r.add_argument("--show", type=int, default=0, help="print so many elements of each array at the end")
    r.set_defaults(function=run)
    u = commands.add_parser("unsupported", help="list what the simulator can't execute in a .ptx file")
    u.add_argument("file")
    u.set_defaults(function=unsupported)
    g = commands.add_parser("gates", help="run the gates of the project's kernels")
    g.add_argument("--kernel", default="", help="the mutants of kernels whose name contains this")
    g.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="triton: with TRITON_INTERPRET=0")
    g.add_argument("--docs", help="measure everything and write the table to this file")
    g.add_argument("--minutes", type=float, default=float("inf"), help="with --docs: begin nothing new after that, and say so")
    g.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    g.add_argument("--measure", choices=("cuda", "triton"), help=argparse.SUPPRESS)
    g.set_defaults(function=gates)
    options = parser.parse_args(argv)
    try:
        return options.function(options)
    except (SimulatorError, build.BuildError, LookupError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
