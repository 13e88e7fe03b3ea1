"""``info``, ``--help`` and the entry point."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from _cli import ROOT, invoke, strict_json

from dl4ds_kernels import _extension, benchmark, cli


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
        for op in ("add_act", "bn_act", "conv_bn_act")
        for way in ("fwd", "fwd+bwd")
        for name in ("cpu", "reference")
    }
    assert ("nms", "fwd", "auto") in checked


def test_info_reports_a_broken_op(monkeypatch):
    from dl4ds_kernels import functional as F

    monkeypatch.setattr(F, "add_act", lambda x, residual, **_: x + residual)
    code, out, err = invoke("info")
    assert code == 1 and "add_act fwd fp32 on cpu" in err and "wrong" in out


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
