"""The choice of a backend: argument > with-block > setter > environment > auto, and what explain says about it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import skip_unless_loaded

import dl4ds_kernels as dk
from dl4ds_kernels import _backend
from dl4ds_kernels import functional as F
from dl4ds_kernels._backend import MIN_NUMEL, REFERENCE, STOCK, select
from dl4ds_kernels._define import CPP, TRITON, defined_ops, has_kernel, op

BIG, SMALL = torch.randn(2, 64, 40, 40), torch.randn(2, 3, 4, 5)


def test_auto_takes_kernels_where_they_are_faster() -> None:
    skip_unless_loaded("cpu")
    assert select("bn_act", BIG) is CPP
    assert select("bn_act", SMALL) is STOCK
    assert select("bn_act", BIG.to(torch.complex64)) is STOCK
    for name, least in MIN_NUMEL.items():
        assert select(name, torch.empty(max(least, 1))) is CPP
        assert least == 0 or select(name, torch.empty(least - 1)) is STOCK


def test_order_of_precedence() -> None:
    skip_unless_loaded("cpu")
    dk.backend("reference")
    assert select("bn_act", SMALL) is REFERENCE
    with dk.backend("cpu"):
        assert select("bn_act", SMALL) is CPP
        assert select("bn_act", SMALL, "reference") is REFERENCE
        with dk.backend("auto"):
            assert select("bn_act", SMALL) is STOCK
        assert select("bn_act", SMALL) is CPP
    assert select("bn_act", SMALL) is REFERENCE
    dk.backend("auto")
    assert select("bn_act", SMALL) is STOCK


def test_block_is_left_by_an_exception() -> None:
    with pytest.raises(KeyError), dk.backend("reference"):
        raise KeyError
    assert _backend.current() == "auto"


def test_block_is_of_one_thread_setter_of_all() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(_backend.current())

    with dk.backend("reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    dk.backend("cpu")
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == ["auto", "cpu"]


def test_environment_variable() -> None:
    code = (
        "import torch, dl4ds_kernels as dk\n"
        "assert dk.explain('add_act', torch.ones(3))['path'] == 'reference'\n"
        "assert dk.explain('add_act', torch.ones(3), backend='auto')['path'] == 'stock torch'\n"
        "assert torch.equal(dk.functional.add_act(torch.ones(3), torch.ones(3)), 2 * torch.ones(3))\n"
    )
    root = Path(__file__).parent.parent
    env = {**os.environ, "DL4DS_BACKEND": "reference", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=root)


def test_nms_goes_by_the_kernels_that_there_are() -> None:
    """The same choice as every op: any size on the CPU, fp64 on CUDA too, torchvision for what has no kernel."""
    skip_unless_loaded("cpu")
    boxes = torch.rand(3, 4)
    for name in ("nms", "batched_nms", "nms_padded"):
        assert has_kernel(name, CPP, "cpu") and not has_kernel(name, CPP, "meta")
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            assert select(name, boxes.to(dtype)) is CPP
        assert select(name, boxes.int()) is STOCK and select(name, boxes.to("meta")) is STOCK
        assert dk.explain(name, boxes)["path"] == "C++ (cpu)"
        with pytest.raises(RuntimeError, match=f"{name}: backend: 'cuda' needs cuda tensors, got x on cpu"):
            select(name, boxes, "cuda")
    with pytest.raises(RuntimeError, match="nms: backend: 'cuda' needs cuda tensors"):
        F.nms(boxes, torch.rand(3), 0.5, backend="cuda")
    with dk.backend("reference"):
        assert dk.explain("nms", boxes)["path"] == "reference"


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "stock"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(ValueError, match="expected one of auto, cpu, cuda, triton, reference"):
        dk.backend(name)
    if name:
        with pytest.raises(ValueError, match="add_act.*expected one of auto"):
            F.add_act(SMALL, SMALL, backend=name)


def test_explicit_choice_is_binding() -> None:
    with pytest.raises(RuntimeError, match=r"bn_act: backend: 'cuda' needs cuda tensors, got x on cpu"):
        F.bn_act(SMALL, None, None, training=True, backend="cuda")
    with pytest.raises(RuntimeError, match="add_act: backend: 'cpu' needs cpu tensors, got x on meta"):
        F.add_act(SMALL.to("meta"), SMALL.to("meta"), backend="cpu")


def test_every_choice_gives_the_same_numbers() -> None:
    skip_unless_loaded("cpu")
    expected = torch.relu(torch.nn.functional.batch_norm(BIG, None, None, training=True))
    for name in ("auto", "cpu", "reference"):
        torch.testing.assert_close(F.bn_act(BIG, None, None, training=True, backend=name), expected)
        with dk.backend(name):
            torch.testing.assert_close(F.bn_act(BIG, None, None, training=True), expected)


def test_the_kernel_really_runs() -> None:
    """Parity of a fallback with itself proves nothing: the profiler sees our op on one side and only there."""
    skip_unless_loaded("cpu")

    def ops_run(backend: str) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            F.bn_act(BIG, None, None, training=True, backend=backend)
            F.add_act(BIG, BIG, backend=backend)
            F.conv_bn_act(BIG, BIG[:, :, :1, :1], running_mean=torch.zeros(2), running_var=torch.ones(2), backend=backend)
        return {e.name for e in profile.events() if e.name.startswith("dl4ds_kernels::")}

    assert ops_run("cpu") == {f"{CPP}::{name}" for name in ("bn_act", "add_act", "conv_bn_act")}
    assert ops_run("reference") == set()


def test_explain() -> None:
    report = dk.explain("bn_act", SMALL)
    assert report["path"] == "stock torch" and report["backend"] == "auto" and report["device"] == "cpu"
    assert str(SMALL.numel()) in report["reason"] and str(MIN_NUMEL["bn_act"]) in report["reason"]
    assert dk.explain("bn_act", SMALL, backend="reference") == {
        "op": "bn_act", "backend": "reference", "path": "reference", "device": "cpu", "reason": "asked for",
    }  # fmt: skip
    skip_unless_loaded("cpu")
    assert dk.explain("bn_act", BIG)["path"] == "C++ (cpu)"
    with pytest.raises(ValueError, match="explain: op: expected one of"):
        dk.explain("softmax", BIG)


def test_exporting_takes_stock_ops() -> None:
    """What leaves the process is standard ops that any runtime knows."""

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.bn_act(x, torch.zeros(64), torch.ones(64))
            return F.add_act(y, x)

    graph = torch.export.export(Block(), (BIG,)).graph
    assert not [node for node in graph.nodes if "dl4ds" in str(node.target)]
    traced = torch.jit.trace(Block(), BIG)
    assert "dl4ds_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(BIG), Block()(BIG))


@pytest.mark.parametrize("namespace", [CPP, TRITON])
@pytest.mark.parametrize("name", sorted(defined_ops()))
def test_every_op_is_defined_in_both_namespaces(name: str, namespace: str) -> None:
    """One contract: the same schema in both, tagged for torch.compile."""
    first, second = op(name, CPP)._schema, op(name, namespace)._schema
    assert str(first).split("::")[1] == str(second).split("::")[1]
    assert torch.Tag.pt2_compliant_tag in op(name, namespace).tags
    assert first.is_mutable == name.endswith("_into") and not any(r.alias_info for r in first.returns)
