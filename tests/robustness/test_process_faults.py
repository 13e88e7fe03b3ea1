"""Threads, processes, devices and streams: F48 to F50. What needs a GPU is read from the sources, or skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _stock import bn_vectors
from torch import Tensor

import dl4ds_kernels as dk
from dl4ds_kernels import _extension
from dl4ds_kernels import functional as F

ROOT = Path(__file__).parent.parent.parent


def python(code: str, timeout: int = 600, **environment: str) -> str:
    """Standard output of ``code`` in a fresh process; the test fails where it does."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cuda_host_functions() -> dict[str, str]:
    """Every registered CUDA host function and its body."""
    found = {}
    for path in sorted((ROOT / "csrc/ops").glob("*/*_cuda.cpp")):
        text = path.read_text()
        for name in re.findall(r"m\.impl\(\"\w+\", TORCH_BOX\(&(?:dl4ds::)?(\w+)\)\)", text):
            start = re.search(rf"^[^\n;]*\b{name}\(", text, re.MULTILINE)
            assert start, f"{path.name}: {name}"
            end = re.search(r"^}", text[start.start() :], re.MULTILINE)
            found[name] = text[start.start() : start.start() + end.end()]
    return found


def test_F48_every_cuda_function_guards_its_device() -> None:
    """Tensors on cuda:1 while cuda:0 is current: a CudaScope of an input is made before anything is allocated or launched."""
    functions = cuda_host_functions()
    assert len(functions) >= 8
    for name, body in functions.items():
        scope = re.search(r"\b(CudaScope|CudaWork|Scope)\b", body)
        first = re.search(r"\b(launch_\w+|empty_\w*cuda|copy_to)\b", body)
        assert scope or "_cuda(" in body, f"{name}: no device guard"
        assert not (scope and first) or scope.start() < first.start(), f"{name}: works before the guard"


def test_F48_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; covered by bench/gpu_check.py F48")
    with torch.cuda.device(0):
        x = torch.randn(2, 8, 40, 40, device="cuda:1")
        vectors = [v.to("cuda:1") for v in bn_vectors(8)]
        assert F.add_act(x, x, backend="cuda").device.index == 1
        torch.testing.assert_close(F.bn_act(x, *vectors, backend="cuda").cpu(), F.bn_act(x.cpu(), *bn_vectors(8)))
        assert torch.cuda.current_device() == 0


def test_F48_error_for_tensors_on_two_devices() -> None:
    """The nearest thing without a second device: meta stands for it."""
    x = torch.randn(2, 8, 40, 40)
    for backend in (None, "cpu"):
        with pytest.raises(RuntimeError, match="expected a tensor on cpu like x, got meta"):
            F.bn_act(x, *(v.to("meta") for v in bn_vectors(8)), backend=backend)


def test_F49_launches_use_the_current_stream() -> None:
    """Every launch gets the stream of the scope; none names the default stream or waits for the device."""
    host = (ROOT / "csrc/common/cuda/host.h").read_text()
    assert "aoti_torch_get_current_cuda_stream(x.device_index" in host
    for path in [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*_cuda.cpp")]:
        text = re.sub(r"//.*", "", path.read_text())
        for arguments in re.findall(r"<<<(.*?)>>>", text, re.DOTALL):
            assert arguments.count(",") == 3 and "stream" in arguments.split(",")[3], f"{path.name}: <<<{arguments}>>>"
        for word in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMalloc", "cudaMemcpy(", "cudaStreamLegacy"):
            assert word not in text, f"{path.name}: {word}"


def test_F49_side_stream_and_graph_capture() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; covered by bench/gpu_check.py F49")
    x, static = (torch.randn(8, 32, 64, 64, device="cuda") for _ in range(2))
    vectors = [v.cuda() for v in bn_vectors(32)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = F.bn_act(x, *vectors, residual=x, backend="cuda")
        out.record_stream(side)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, F.bn_act(x, *vectors, residual=x, backend="cuda"))
    graph = torch.cuda.CUDAGraph()
    F.bn_act(static, *vectors, backend="cuda")
    with torch.cuda.graph(graph):
        captured = F.bn_act(static, *vectors, backend="cuda")
    static.copy_(x)
    graph.replay()
    assert torch.equal(captured, F.bn_act(x, *vectors, backend="cuda"))


def test_F49_backward_in_many_autograd_calls_at_once(kernels: None) -> None:
    """Eight threads differentiate one shared graph's inputs; each gets the gradients of a single call."""
    x = torch.randn(4, 16, 64, 64)
    weight = torch.randn(16)

    def gradients() -> tuple[Tensor, ...]:
        leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = F.bn_act(leaf, None, None, scale, training=True, residual=leaf, backend="cpu")
        return torch.autograd.grad(F.add_act(out, leaf, backend="cpu").square().sum(), (leaf, scale))

    expected = gradients()
    run_in_threads(lambda _: [check_equal(gradients(), expected) for _ in range(6)])


def check_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def run_in_threads(work: Callable[[int], object], count: int = 8) -> None:
    """``work(i)`` in ``count`` threads that start together; the first exception is raised here."""
    errors: list[BaseException] = []
    gate = threading.Barrier(count)

    def body(i: int) -> None:
        try:
            gate.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def calls(x: Tensor) -> list[Tensor]:
    """Every op once on ``x`` (N, 16, H, W), H and W even."""
    mean, var, weight, bias = bn_vectors(16)
    boxes = torch.cat([x[0, 0, :, :2] * 20, x[0, 0, :, :2] * 20 + 15], 1)
    with torch.no_grad():
        pooled, where = F.max_pool_indices(x, backend="cpu")
        return [
            F.add_act(x, x, backend="cpu"),
            F.bn_act(x, mean, var, weight, bias, training=True, backend="cpu"),
            F.conv_bn_act(x, torch.ones(8, 16, 3, 3), running_mean=mean[:8], running_var=var[:8], backend="cpu"),
            pooled,
            F.max_unpool(pooled, where, backend="cpu"),
            F.upsample_add(pooled, x, backend="cpu"),
            F.nms(boxes, x[0, 1, :, 0].contiguous(), 0.4, backend="cpu"),
        ]


def test_F50_eight_threads_every_op(kernels: None) -> None:
    """Different data and sizes in each thread, the pool shared: results as from one thread, and no memory left in use."""
    host = _extension.host()
    inputs = [torch.randn(1 + i % 3, 16, 32 + 2 * i, 48, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [calls(x) for x in inputs]
    used = host.pool_stats()["used_bytes"]
    run_in_threads(lambda i: [check_equal(tuple(calls(inputs[i])), tuple(expected[i])) for _ in range(10)])
    assert host.pool_stats()["used_bytes"] == used


def test_F50_outputs_handed_between_threads(kernels: None) -> None:
    """Made in one thread, freed in another, while a third trims the pool and changes its limit."""
    import queue

    host, limit = _extension.host(), _extension.host().pool_stats()["limit_bytes"]
    x = torch.randn(2, 16, 64, 64)
    expected = torch.relu(x + x)
    used = host.pool_stats()["used_bytes"]
    line: queue.Queue[Tensor | None] = queue.Queue(maxsize=8)

    def work(i: int) -> None:
        if i < 3:  # as many as there are consumers: one stops at each None
            for _ in range(80):
                line.put(F.add_act(x, x, backend="cpu"))
            line.put(None)
        elif i < 5:
            for k in range(100):
                host.pool_trim()
                host.pool_set_limit((k % 4) << 20)
        else:
            while (out := line.get()) is not None:
                assert torch.equal(out, expected)

    try:
        run_in_threads(work)
        while not line.empty():
            line.get()
        del work
        assert host.pool_stats()["used_bytes"] == used
    finally:
        host.pool_set_limit(limit)


def test_F50_thread_count_changes_while_others_compute(kernels: None) -> None:
    """torch.set_num_threads between and during calls changes no bit."""
    x = torch.randn(4, 16, 64, 64)
    expected = tuple(calls(x))

    def work(i: int) -> None:
        for k in range(8):
            torch.set_num_threads(1 + (i + k) % 3)
            check_equal(tuple(calls(x)), expected)

    run_in_threads(work, 4)


def test_F50_free_threaded_python() -> None:
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this Python has a GIL; the tests above release it in every torch op, and C++ holds no Python state")
    assert not sys._is_gil_enabled(), "importing the package must not switch the GIL back on"
    test_F50_eight_threads_every_op(None)


FORK = """
import os, sys, torch
import dl4ds_kernels as dk
from dl4ds_kernels import functional as F
torch.set_num_threads(2)
x = torch.randn(2, 16, 64, 64)
expected = F.add_act(x, x, backend="cpu")
kept = [F.add_act(x, x, backend="cpu") for _ in range(3)]
children = []
for k in range(4):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork; torch asks for the same
        good = all(torch.equal(F.add_act(x, x, backend="cpu"), expected) for _ in range(20))
        kept.clear()
        dk._extension.host().pool_trim()
        os._exit(0 if good else 1)
    children.append(child)
    kept.append(F.add_act(x, x, backend="cpu"))
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert all(torch.equal(out, expected) for out in kept)
print("forked")
"""


def test_F50_fork(kernels: None) -> None:
    """Children use the pool they inherited, also while the parent goes on."""
    if sys.platform == "win32":
        pytest.skip("no fork on this system")
    assert python(FORK, timeout=120) == "forked\n"


FORK_WHILE_BUSY = """
import os, threading, torch
from dl4ds_kernels import functional as F
torch.set_num_threads(1)
x = torch.randn(2, 16, 64, 64)
stop = threading.Event()
def busy():
    while not stop.is_set():
        F.add_act(x, x, backend="cpu")
threads = [threading.Thread(target=busy) for _ in range(3)]
[t.start() for t in threads]
for _ in range(25):
    child = os.fork()
    if child == 0:
        out = F.add_act(x, x, backend="cpu")
        os._exit(0 if torch.equal(out, torch.relu(x + x)) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
print("forked")
"""


def test_F50_fork_while_other_threads_hold_the_pool(kernels: None) -> None:
    """The pool's lock is taken around fork: a child never inherits it locked (that would hang here)."""
    if sys.platform == "win32":
        pytest.skip("no fork on this system")
    assert python(FORK_WHILE_BUSY, timeout=120) == "forked\n"


def test_F50_nothing_in_the_cpu_part_is_made_under_a_guard() -> None:
    """No function-local static with a guard: a child forked during another thread's first call would wait for it forever.

    (Seen once: cache_sizes() read its files while the first of the forks above happened.) Variables of a namespace are made
    while the library is loaded; their guards have no parentheses in their names.
    """
    part = _extension.status()["_C"]
    if not part.loaded or shutil.which("nm") is None:
        pytest.skip("no compiled CPU part, or no nm (binutils) to read it with")
    listing = subprocess.run(["nm", "-C", part.path], capture_output=True, text=True, check=True).stdout
    if "dl4ds::" not in listing:
        pytest.skip("a stripped build has no names")
    assert [line for line in listing.splitlines() if re.search(r"guard variable for dl4ds::.*\)::\w+$", line)] == []


def test_F50_fork_after_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; covered by bench/gpu_check.py F50")
    code = (
        "import os, torch\nfrom dl4ds_kernels import functional as F\nx = torch.randn(9, device='cuda')\nF.add_act(x, x)\n"
        "child = os.fork()\nif child == 0:\n    try:\n        F.add_act(torch.randn(9, device='cuda'), x)\n"
        "    except RuntimeError as error:\n        os._exit(0 if 'forked subprocess' in str(error) else 2)\n    os._exit(1)\n"
        "assert os.waitpid(child, 0)[1] == 0\nprint('told')"
    )
    assert python(code) == "told\n"


EXITS = {
    "live-outputs": "kept = [F.add_act(x, x, backend='cpu') for _ in range(4)]",
    "outputs-in-a-cycle": "class Node: pass\nnode = Node(); node.me = node; node.out = F.add_act(x, x, backend='cpu')",
    # Daemon threads are left out: Python ends them by pthread_exit, which aborts in stock torch's operators as well.
    "threads-after-main": (
        "import threading\ndef busy():\n    for _ in range(200):\n        F.add_act(x, x, backend='cpu')\n"
        "[threading.Thread(target=busy).start() for _ in range(3)]"
    ),
    "gradients-pending": "y = x.requires_grad_(); z = F.bn_act(y, None, None, training=True, backend='cpu')",
    "atexit-call": "import atexit\natexit.register(lambda: F.add_act(x, x, backend='cpu'))",
    "optimized-model": "m = dk.optimize(torch.nn.Sequential(torch.nn.Conv2d(16, 8, 3), torch.nn.BatchNorm2d(8)).eval()); m(x)",
}


@pytest.mark.parametrize("name", EXITS)
def test_F50_interpreter_exit(name: str, kernels: None) -> None:
    """Tensors, threads and callbacks that outlive the module: the process ends with 0 and says nothing."""
    code = (
        "import torch\nimport dl4ds_kernels as dk\nfrom dl4ds_kernels import functional as F\nx = torch.randn(2, 16, 64, 64)\n"
    )
    assert python(code + EXITS[name] + "\nprint('end')").endswith("end\n")


class Boxes(torch.utils.data.Dataset):
    """A data set whose workers call the ops."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        assert not torch.cuda.is_initialized()
        x = torch.full((2, 16, 64, 64), float(i))
        return F.add_act(x, x, backend="cpu").sum()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_F50_data_loader_workers(context: str, kernels: None) -> None:
    """Workers import the package and run it without touching CUDA."""
    if context == "fork" and sys.platform == "win32":
        pytest.skip("no fork on this system")
    loader = torch.utils.data.DataLoader(Boxes(), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert [float(v) for v in loader] == [2.0 * i * 2 * 16 * 64 * 64 for i in range(6)]
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


def test_F50_import_does_not_start_cuda() -> None:
    assert python("import torch, dl4ds_kernels\nprint(torch.cuda.is_initialized())") == "False\n"


def test_F50_optimized_models_in_threads(kernels: None) -> None:
    """One model, eight threads, first calls included (they fold and pack): the result of one thread."""
    torch.manual_seed(1)
    stock = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected = stock(x)
    for _ in range(3):
        model = dk.optimize(stock)

        def work(_: int, model: torch.nn.Module = model) -> None:
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

        run_in_threads(work)
