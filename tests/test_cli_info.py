"""``info``, ``--help`` and the entry point."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest
import torch
from _cli import ROOT, invoke, strict_json

from dl4ds_kernels import _extension, benchmark, cli
from dl4ds_kernels import functional as F
from dl4ds_kernels._define import defined_ops
from dl4ds_kernels.cli import _doctor, info


def test_info_as_json(kernels, monkeypatch):
    monkeypatch.setenv("DL4DS_POOL_MB", "64")
    code, out, err = invoke("info", "--json")
    facts = strict_json(out)
    assert code == 0 and facts["problems"] == [], err
    assert facts["parts"]["_C"]["loaded"] and facts["machine"]["torch"] == torch.__version__
    assert facts["environment"]["DL4DS_POOL_MB"] == "64" and facts["cpu_features"]
    checked = {(row["op"], row["direction"], row["provider"]) for row in facts["checks"] if row["device"] == "cpu"}
    assert checked >= {
        (op, way, name)
        for op in ("add_act", "bn_act", "conv_bn_act", "conv_transpose_bn_act", "local_response_norm", "upsample_add")
        for way in ("fwd", "fwd+bwd")
        for name in ("cpu", "reference")
    }
    assert ("nms", "fwd", "auto") in checked and ("max_pool2d", "fwd", "cpu") in checked
    assert all(row["limit"] is not None and row["median_ms"] is None for row in facts["checks"])  # judged, not timed
    assert set(facts["not_here"]["cpu"]) == set(benchmark.OURS) - set(facts["backends"]["cpu"])


def test_info_runs_every_public_function_and_every_op_with_a_kernel():
    """A new function or op joins ``benchmark.OPS`` or the list that says which case covers it."""
    checked = {*benchmark.OPS, *benchmark.COVERS}
    functions = {name for name in F.__all__ if inspect.isfunction(getattr(F, name))}
    assert functions <= checked, "functions without a check"
    # An op of a function's own name is run with it where it has a kernel (bn_act_conv on CUDA).
    covered = checked | {name for op in checked for name in _doctor._KERNELS.get(op, (op,))}
    inner = (
        "_packed",
        "_pack",
        "_chain",
        "_into",
        "_bwd",
        "_buffer",
        "_route",
        "_exact",
        "_pair",
        "_stats",
        "_step",
        "_train",
        "_tail",
    )  # steps of other ops, with their own tests
    public = {name for name in defined_ops() if not name.endswith(inner)}
    assert public <= covered, f"no check runs {sorted(public - covered)}"


def test_info_checks_give_each_backend_that_has_the_kernel():
    assert _doctor.backends("soft_nms", "cpu") == ["auto"]
    if _extension.status()["_C"].loaded:
        assert _doctor.backends("bn_act", "cpu")[:3] == ["auto", "reference", "cpu"]
    assert "cuda" not in _doctor.backends("upsample_add", "cuda")  # no CUDA kernel: asking for it would be an error


def test_the_issue_block_is_complete_and_anonymous(monkeypatch):
    monkeypatch.setenv("DL4DS_AUTOTUNE_CACHE", "/".join(("", "home", "somebody", "times.json")))
    monkeypatch.setattr(F, "upsample_add", lambda low, skip, **_: skip + low.mean())
    facts = info.collect()
    text = facts["issue"]
    assert text.startswith("```text\n") and text.endswith("\n```\n")
    words = ("CPU features:", "part _C:", "part _cuda:", "build:", "GPU:", "DL4DS_AUTOTUNE_CACHE=~/times.json")
    assert all(word in text for word in (torch.__version__, *words))
    assert "somebody" not in text and os.uname().nodename not in text
    bad = [row for row in facts["checks"] if row["status"] not in ("ok", "parity")]
    assert bad and {row["op"] for row in bad} == {"upsample_add"}
    assert f"{len(facts['checks']) - len(bad)} of {len(facts['checks'])} calls" in text
    assert text.count("upsample_add fwd") == len(bad)


def test_no_message_can_close_the_fence(monkeypatch):
    part = _extension.Part("_cuda", reason="``` <b>evil</b> ````", cure="none")
    monkeypatch.setattr(_extension, "_cuda", part)
    monkeypatch.setattr(_doctor, "check", lambda device: [])
    text = info.collect()["issue"]
    fence = text.split("text")[0]
    assert len(fence) == 5 and text.count(fence) == 2


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(info, "_driver", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert info._why_no_gpu() == "no NVIDIA driver is loaded here"
    monkeypatch.setattr(info, "_driver", lambda: "580.1")
    assert "driver too old" in info._why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not a CUDA build" in info._why_no_gpu()


def test_info_names_a_gpu_without_code(monkeypatch):
    """An unsupported GPU is named before anything is launched on it, with the rebuild that helps."""
    monkeypatch.setattr(_extension, "_cuda", _extension.Part("_cuda", loaded=True))
    monkeypatch.setattr(_extension, "gpu_archs", lambda: "8.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: ((7, 5), (8, 6))[index or 0])
    (sentence,) = info._gpu_code()
    assert "this GPU has compute capability 7.5" in sentence and "TORCH_CUDA_ARCH_LIST=7.5" in sentence


def test_info_reports_a_broken_op(monkeypatch):
    monkeypatch.setattr(F, "add_act", lambda x, residual, **_: x + residual)
    code, out, err = invoke("info")
    assert code == 1 and "add_act fwd fp32 on cpu" in err and "wrong" in out and "add_act fwd fp32 cpu auto: wrong" in out


def test_info_reports_a_missing_part_with_the_cure(monkeypatch):
    gone = _extension.Part("_C", reason="the C++ part dl4ds_kernels._C is not built", cure="rebuild it")
    monkeypatch.setattr(_extension, "_cpu", gone)
    code, out, err = invoke("info")
    assert code == 1 and "is not built; rebuild it" in err and "not loaded" in out


@pytest.mark.parametrize("command", [(), ("info",), ("demo",), ("bench",)], ids=lambda c: "-".join(c) or "app")
def test_help(command):
    code, out, _ = invoke(*command, "--help")
    assert code == 0 and "Usage" in out


def test_missing_extras_are_one_line_with_the_cure(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("typer", "jinja2") else found(name, *rest)
    )
    assert cli.main(["info"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'dl4ds_kernels[cli]'" in err
    code, _, err = invoke("demo", "--html", "x.html")
    assert code == 1 and "needs jinja2: pip install 'dl4ds_kernels[demo]'" in err


def test_program_runs_and_the_core_needs_only_torch():
    """One process: the package imports with every optional library hidden, and `python -m` has an exit code."""
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        hidden = {"typer", "rich", "jinja2", "matplotlib", "PIL", "skimage", "torchvision", "triton", "safetensors"}
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import torch, dl4ds_kernels as dk
from dl4ds_kernels import benchmark
assert torch.equal(dk.functional.add_act(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "dl4ds_kernels", "bench", "--op", "none"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "--op: expected" in done.stderr and done.stdout == ""
    assert benchmark.OPS  # the same module serves both


def test_info_with_a_torchvision_of_another_torch(monkeypatch):
    """Its ops are missing then: NMS has nothing to be compared with, which is no fault of ours and is said."""

    def broken(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", broken)
    monkeypatch.setattr(benchmark, "OPS", {name: benchmark.OPS[name] for name in ("nms", "nms_padded", "max_unpool")})
    facts = info.collect()
    assert {row["op"] for row in facts["checks"]} == {"max_unpool"} and facts["problems"] == []
    assert "NMS was not checked" in facts["issue"] and "operator torchvision::nms does not exist" in facts["issue"]
