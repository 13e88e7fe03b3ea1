"""How fast: ceilings of this GPU, every op on ResNet-50's layers, whole models. Nothing is timed whose numbers are wrong."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dl4ds_kernels import benchmark, optimize
from gpu.place import Place, shapes_of

TIMED_SHAPES = "resnet50"
_GIB = 1 << 30


def ceilings() -> dict[str, float]:
    """Measured, not quoted: device-to-device copy (GB/s, read + written) and matrix products (TFLOP/s)."""
    source = torch.empty(_GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = benchmark.measure({"copy": lambda: target.copy_(source)}, rounds=20, device="cuda")["copy"]
    found = {"copy_gbytes_per_s": round(2 * _GIB / timing.median / 1e6, 1)}
    n, before = 8192, torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        timing = benchmark.measure({name: lambda a=a, b=b: a @ b}, rounds=10, device="cuda")[name]
        found[f"matmul_{name}_tflop_per_s"] = round(2 * n**3 / timing.median / 1e9, 1)
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def ops(place: Place, batch: int, rounds: int) -> list[benchmark.Row]:
    """ResNet-50's layers in bf16 and fp32, channels_last, both directions; NMS. A dry run stops after the parity gate."""
    rows = []
    for op, module in benchmark.OPS.items():
        nms = op in benchmark.NMS
        layers = module.select(shapes_of(op, TIMED_SHAPES))
        axes = (
            layers[:2] if place.is_dry else layers,
            ("fp32",) if nms else ("fp32", "bf16"),
            (False, True) if benchmark.differentiable(op) else (False,),
        )
        for layer, dtype, backward in itertools.product(*axes):
            case = benchmark.Case(op, layer, batch, dtype, "nchw" if nms else "nhwc", backward, place.device)
            stock = [name for name in module.STOCK if name != "eager_cl" and not (place.is_dry and name == "compile")]
            providers = stock + [n for n in place.backends() if n != "auto" and place.missing(op, n) is None]
            rows += benchmark.run_cases([case], providers, module, rounds=rounds, time_it=not place.is_dry)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def _tensorrt(model: nn.Module, x: torch.Tensor) -> nn.Module:
    import torch_tensorrt

    return torch_tensorrt.compile(model, inputs=[x], enabled_precisions={x.dtype}, min_block_size=1)


def _candidates(stock: nn.Module, x: torch.Tensor, dry: bool) -> dict[str, Callable[[], nn.Module]]:
    """Ways to run a model in inference."""
    ways: dict[str, Callable[[], nn.Module]] = {
        "eager": lambda: copy.deepcopy(stock),
        "eager channels_last": lambda: copy.deepcopy(stock).to(memory_format=torch.channels_last),
        "ours": lambda: optimize(copy.deepcopy(stock).to(memory_format=torch.channels_last)),
    }
    if not dry:
        ways["torch.compile"] = lambda: torch.compile(
            copy.deepcopy(stock).to(memory_format=torch.channels_last), mode="max-autotune"
        )
        if importlib.util.find_spec("torch_tensorrt"):
            ways["TensorRT"] = lambda: _tensorrt(copy.deepcopy(stock), x)
    return ways


def models(place: Place, rounds: int) -> list[dict[str, Any]]:
    """ResNet-50 inference, batch 1 and 128, bf16 (a dry run: ResNet-18, batch 1, fp32): parity, then milliseconds."""
    import torchvision

    name, dtype = ("resnet18", torch.float32) if place.is_dry else ("resnet50", torch.bfloat16)
    stock = getattr(torchvision.models, name)(weights=None).to(place.device).eval()
    found = []
    for batch in (1,) if place.is_dry else (1, 128):
        image = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(place.device)
        with torch.inference_mode():
            truth = copy.deepcopy(stock).double()(image.double())
            half, x = copy.deepcopy(stock).to(dtype), image.to(dtype).contiguous(memory_format=torch.channels_last)
            allowed = 2 * benchmark.relative_error(half(x), truth.cpu()) + 4 * torch.finfo(dtype).eps
            calls, row = {}, {"model": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "ways": {}}
            for way, make in _candidates(half, x, place.is_dry).items():
                try:
                    model = make()
                    error = benchmark.relative_error(model(x), truth.cpu())
                except Exception as reason:  # a peer that fails must not end the report
                    row["ways"][way] = {"status": f"{type(reason).__name__}: {reason}"[:300]}
                    continue
                ok = error <= allowed
                row["ways"][way] = {"status": "ok" if ok else "wrong", "error": error, "limit": allowed}
                if ok:
                    calls[way] = lambda model=model, x=x: model(x)
            if not place.is_dry:
                for way, timing in benchmark.measure(calls, rounds=rounds, device=place.device).items():
                    row["ways"][way] |= timing.as_dict()
        found.append(row)
    return found
