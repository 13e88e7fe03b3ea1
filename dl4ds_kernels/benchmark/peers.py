"""Runtimes and compilers that whole models are compared with: by ``bench --model`` and by bench/models.

A maker returns a call without arguments; a failure is named with its reason.

`pip install onnxruntime openvino onnx ncnn`, and `pip install --no-deps pnnx` for ncnn's converter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Call = Callable[[], Any]


def fold(model: nn.Module) -> nn.Module:
    """A copy with every BatchNorm that follows a convolution folded into it, found by symbolic tracing."""
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).eval())
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op == "call_module" and type(modules[before.target]) is nn.Conv2d and len(before.users) == 1:
            parent, _, name = before.target.rpartition(".")
            fused = fuse_conv_bn_eval(modules[before.target], modules[node.target])
            setattr(traced.get_submodule(parent), name, fused)
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def folded(model: nn.Module, x: Tensor, threads: int) -> Call:
    """PyTorch eager with BatchNorm folded into the convolutions, channels_last."""
    small, last = fold(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return lambda: small(last)


def _inductor(model: nn.Module, x: Tensor, threads: int, freezing: bool) -> Call:
    import torch._inductor.config as config
    from torch._dynamo.utils import counters

    last, torch_x = copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(last, dynamic=False)
    counters.clear()
    with config.patch(freezing=freezing):
        compiled(torch_x)
    if freezing and not counters["inductor"].get("binary_folding") and not sum(counters["inductor"].values()):
        raise RuntimeError("nothing was frozen")
    return lambda: compiled(torch_x)


@functools.lru_cache(maxsize=1)  # two runtimes read it
def _onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), buffer, dynamo=False, input_names=["x"], opset_version=17)
    return buffer.getvalue()


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_onnx_bytes(model, x), options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: session.run(None, {"x": array})[0]


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Call:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(_onnx_bytes(model, x)), "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer({0: array})[0]


def _ncnn(model: nn.Module, x: Tensor, threads: int) -> Call:
    import ncnn
    import numpy
    import pnnx

    image = x[:1].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.jit.trace(model, image, check_trace=False).save(str(path / "m.pt"))
        shape = ",".join(map(str, image.shape))
        done = subprocess.run(
            [pnnx.EXEC_PATH, "m.pt", f"inputshape=[{shape}]f32", "fp16=0"], cwd=path, capture_output=True, text=True
        )
        if not (path / "m.ncnn.param").exists():
            raise RuntimeError(f"pnnx made no ncnn model (exit code {done.returncode})")
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_fp16_packed = False
        net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
        net.opt.openmp_blocktime = 0  # its threads do not spin in the others' samples
        if net.load_param(str(path / "m.ncnn.param")) or net.load_model(str(path / "m.ncnn.bin")):
            raise RuntimeError("ncnn does not load what pnnx made")
    images = [ncnn.Mat(one).clone() for one in x.numpy()]

    def call() -> Any:
        outputs = []
        for one in images:  # ncnn has no batches
            extractor = net.create_extractor()
            extractor.input("in0", one)
            outputs.append(numpy.array(extractor.extract("out0")[1]))
        return numpy.stack(outputs)

    return call


Maker = Callable[[nn.Module, Tensor, int], Call]
RUNTIMES: dict[str, Maker] = {"onnxruntime": _onnxruntime, "openvino": _openvino, "ncnn": _ncnn}  # packages of their own
_INDUCTOR: dict[str, Maker] = {
    "inductor": functools.partial(_inductor, freezing=False),
    "inductor frozen": functools.partial(_inductor, freezing=True),
}


def make(model: nn.Module, x: Tensor, threads: int, with_compile: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Every peer: (name -> call, name -> why it is missing)."""
    found, missing = build({"folded": folded} | (_INDUCTOR if with_compile else {}) | RUNTIMES, model, x, threads)
    if not with_compile:
        missing |= dict.fromkeys(_INDUCTOR, "not asked for (--compile)")
    return found, missing


def build(makers: dict[str, Maker], model: nn.Module, x: Tensor, threads: int) -> tuple[dict[str, Call], dict[str, str]]:
    """These peers: (name -> call, name -> why it is missing)."""
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, maker in makers.items():
        if name in RUNTIMES and importlib.util.find_spec(name) is None:
            missing[name] = f"{name} is not installed"
            continue
        try:
            with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # exporters deprecate one another
                found[name] = maker(model, x, threads)
            found[name]()
        except Exception as error:  # one peer's failure must not hide the other rows; it is printed with the table
            found.pop(name, None)
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return found, missing
