"""Importing never fails: no compiled part, a torn or foreign one, no triton, no GPU, an old torch. Each in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dl4ds_kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# In every broken state: import works, auto falls back to stock torch, an explicit backend says what is wrong.
CALLS = """
import torch
import dl4ds_kernels as dk
from dl4ds_kernels import functional as F
x = torch.randn(2, 16, 40, 40)
mean, var, w = torch.zeros(16), torch.ones(16), torch.randn(16, 16, 3, 3)
bn = torch.nn.functional.batch_norm(x, mean, var)
assert torch.equal(F.bn_act(x, mean, var), bn.relu())
assert torch.equal(F.add_act(x, x), (x + x).relu())
leaf = x.clone().requires_grad_()
F.bn_act(leaf, mean, var, training=True, residual=x).sum().backward()
assert leaf.grad.isfinite().all()
with torch.no_grad():
    conv = torch.nn.functional.conv2d(x, w)
    expected = torch.nn.functional.batch_norm(conv, torch.zeros(16), torch.ones(16)).relu()
    torch.testing.assert_close(F.conv_bn_act(x, w, running_mean=torch.zeros(16), running_var=torch.ones(16)), expected)
    layer = dk.modules.ConvBNAct2d(16, 8, 3).eval()
    assert layer(x).shape == (2, 8, 38, 38)
calls = {
    "bn_act": lambda: F.bn_act(x, mean, var, backend="cpu"),
    "add_act": lambda: F.add_act(x, x, backend="cpu"),
    "conv_bn_act": lambda: F.conv_bn_act(x, w, running_mean=mean, running_var=var, backend="cpu"),
}
for name, call in calls.items():
    with torch.no_grad():
        try:
            call()
        except RuntimeError as error:
            print(name, "->", error)
        else:
            raise AssertionError(name)
print(dk.explain("bn_act", x))
"""


def python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with the package found in ``path`` and nowhere else."""
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=path, env=env, capture_output=True, text=True, timeout=120)


def succeeds(code: str, path: Path, **environment: str) -> str:
    result = python(code, path, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package without its compiled parts, in a folder of its own."""
    shutil.copytree(
        PACKAGE, tmp_path / "dl4ds_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    )
    return tmp_path


def says(output: str, *words: str) -> None:
    for name in ("bn_act", "add_act", "conv_bn_act"):
        line = next(line for line in output.splitlines() if line.startswith(f"{name} ->"))
        for word in (name, *words):
            assert word in line.split("->", 1)[1], line


def test_no_compiled_part(bare: Path) -> None:
    says(succeeds(CALLS, bare), "not built", "pip install")


def test_torn_file(bare: Path) -> None:
    built = next(PACKAGE.glob("_C.*.so"), None)
    content = built.read_bytes() if built else b"\x7fELF"
    (bare / "dl4ds_kernels" / f"_C{SUFFIX}").write_bytes(content[: len(content) // 3])
    says(succeeds(CALLS, bare), "does not load", "rebuild")


def test_file_of_another_python(bare: Path) -> None:
    (bare / "dl4ds_kernels" / "_C.cpython-39-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    (bare / "dl4ds_kernels" / "_build_info.json").write_text('{"python": "CPython 3.9.7"}')
    says(succeeds(CALLS, bare), "does not load", "CPython 3.9.7", "rebuild")


def test_torn_build_info(bare: Path) -> None:
    (bare / "dl4ds_kernels" / "_build_info.json").write_text('{"python": ')
    succeeds("import dl4ds_kernels as dk; assert dk._extension.build_info() == {}", bare)


def test_torch_too_old(bare: Path) -> None:
    built = next(PACKAGE.glob("_C.*.so"), None)
    if built is None:
        pytest.skip("the C++ part is not built: there is nothing that an old torch could not load")
    shutil.copy(built, bare / "dl4ds_kernels")
    output = succeeds("import torch; torch.__version__ = '2.9.1+cpu'\n" + CALLS, bare)
    says(output, "needs torch >= 2.10", "2.9.1", "upgrade torch")


def test_no_triton(bare: Path) -> None:
    """triton blocked: import and CPU calls work; the Triton backend says what is missing."""
    block = "import sys; sys.modules['triton'] = None\n"
    code = block + CALLS + (
        "try:\n    F.add_act(x, x, backend='triton')\n"
        "except RuntimeError as error:\n    print('triton ->', error)\n"
        "else:\n    raise AssertionError\n"
    )  # fmt: skip
    line = succeeds(code, bare, TRITON_INTERPRET="1").splitlines()[-1]
    assert line.startswith("triton ->") and "add_act" in line and "pip install triton" in line


def test_triton_backend_on_cpu_tensors_says_how(bare: Path) -> None:
    code = "import torch, dl4ds_kernels.functional as F\nF.add_act(torch.ones(3), torch.ones(3), backend='triton')"
    result = python(code, bare, TRITON_INTERPRET="0")
    assert result.returncode and "TRITON_INTERPRET=1" in result.stderr and "add_act" in result.stderr


def test_import_touches_neither_cuda_nor_optional_packages() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import dl4ds_kernels
assert not torch.cuda.is_initialized()
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert not added & {"triton", "torchvision", "matplotlib", "typer", "rich", "numpy", "skimage"}, added
"""
    succeeds(code, PACKAGE.parent)


def test_import_time() -> None:
    """Our own modules cost less than half a second over torch's (best of three)."""
    code = "import time, torch; start = time.process_time(); import dl4ds_kernels; print(time.process_time() - start)"
    assert min(float(succeeds(code, PACKAGE.parent)) for _ in range(3)) < 0.5


def test_import_in_a_forked_child_and_twice() -> None:
    succeeds(
        "import importlib, os, sys, torch, dl4ds_kernels as dk\n"
        "from dl4ds_kernels import functional as F\n"
        "x = torch.randn(2, 16, 64, 64)\n"
        "expected = F.add_act(x, x)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(F.add_act(x, x), expected) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n",
        PACKAGE.parent,
    )


def test_unknown_backend_variable_is_named() -> None:
    result = python("import dl4ds_kernels", PACKAGE.parent, DL4DS_BACKEND="gpu")
    assert result.returncode and "DL4DS_BACKEND: expected one of auto" in result.stderr and "'gpu'" in result.stderr
