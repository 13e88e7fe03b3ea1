"""The pytest-benchmark form of the engine's own cases, so that both report on the same calls.

    pytest bench/ops/bench_add_act.py --shapes resnet50.layer1 --dtypes fp32,bf16 --layouts nhwc

Every file here names its op; parity comes first: a wrong provider fails and is never timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dl4ds_kernels import benchmark as engine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dl4ds_kernels")
    group.addoption("--shapes", help="as in `python -m dl4ds_kernels bench --shapes`; default: the op's own")
    group.addoption("--dtypes", default="fp32", help="comma-separated")
    group.addoption("--layouts", default="nhwc", help="comma-separated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, device = metafunc.config.getoption, "cuda" if torch.cuda.is_available() else "cpu"
    cases, providers = [], {}
    for op in getattr(metafunc.module, "OPS", None) or (metafunc.module.OP,):
        module, boxes = engine.OPS[op], op in engine.NMS
        axes = (
            module.select(option("--shapes") or module.DEFAULT),
            option("--dtypes").split(","),
            ["nchw"] if boxes else option("--layouts").split(","),
            [False, True] if engine.differentiable(op) else [False],
        )
        cases += [
            engine.Case(op, layer, 1, dtype, layout, backward, device)
            for layer, dtype, layout, backward in itertools.product(*axes)
        ]
        providers |= dict.fromkeys(name for name in module.STOCK if name != "compile")
    providers |= dict.fromkeys(engine.default_backends(device))
    metafunc.parametrize("case", cases, ids=lambda case: f"{case.op}-{case.id}")
    metafunc.parametrize("provider", list(providers))


@pytest.fixture
def measured(benchmark: Any, case: engine.Case, provider: str) -> Callable[[], None]:
    """Parity of ``provider`` on ``case``, then its time; on a GPU each call waits for its end."""

    def measure() -> None:
        module = engine.OPS[case.op]
        row = engine.run_cases([case], [provider], module, time_it=False)[0]
        if row.status == "unavailable":
            pytest.skip(row.message)
        assert row.status == "ok", f"{row.status}: {row.message}"
        with torch.set_grad_enabled(case.backward):
            run = module.setup(case, provider)

            def synchronised() -> None:
                run.fn()
                torch.cuda.synchronize()

            benchmark(synchronised if case.device.startswith("cuda") else run.fn)
        benchmark.extra_info.update(bytes=run.bytes, flops=run.flops)

    return measure
