"""The benchmark engine behind ``python -m dl4ds_kernels bench``, bench/ and ``info``: parity gate, then interleaved timing."""

from ._case import DTYPES, LAYOUTS, OURS, STOCK, Case, Run, Unavailable, default_backends, why_not
from ._engine import Row, failed, relative_error, run_case, run_cases
from ._machine import machine
from ._roof import peak_gbytes, peak_gflops
from ._timing import Timing, measure, quantile, speedup, speedup_range
from .ops import COVERS, NMS, OPS, differentiable

__all__ = [
    "COVERS",
    "DTYPES",
    "LAYOUTS",
    "NMS",
    "OPS",
    "OURS",
    "STOCK",
    "Case",
    "Row",
    "Run",
    "Timing",
    "Unavailable",
    "default_backends",
    "differentiable",
    "failed",
    "machine",
    "measure",
    "peak_gbytes",
    "peak_gflops",
    "quantile",
    "relative_error",
    "run_case",
    "run_cases",
    "speedup",
    "speedup_range",
    "why_not",
]
