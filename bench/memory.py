"""Memory of a model's inference on the CPU, ours against eager and ONNX Runtime: python bench/memory.py [--model resnet50]

Each way runs in a process of its own. Reported are the peak of resident memory from after the imports until the third call
(weights, packs, workspace, outputs: what the model costs) and of the whole process (the libraries too). ONNX Runtime gets the
model as a file, so that no torch is in its process. Written to bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _results import RESULTS, markdown, save

WAYS = ("eager", "eager_cl", "ours", "ours_exact", "onnxruntime")
THREADS = 2


def _peak_mib() -> float:
    """Highest resident memory since the last reset, by the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status: memory is measured on Linux")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _onnxruntime(file: str, shape: tuple[int, ...]) -> dict[str, float]:
    import numpy
    import onnxruntime

    _reset_peak()
    before = _peak_mib()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    x = numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32)
    for _ in range(3):
        session.run(None, {"x": x})
    return {"model_mib": _peak_mib() - before, "process_mib": _peak_mib()}


def _torch(way: str, name: str, shape: tuple[int, ...]) -> dict[str, float]:
    import torch
    import torchvision

    import dl4ds_kernels as dk

    torch.set_num_threads(THREADS)
    _reset_peak()
    before = _peak_mib()
    model = getattr(torchvision.models, name)(weights=None).eval()
    if way.startswith("ours"):
        model = dk.optimize(model, inplace=True, exact=way == "ours_exact")
    x = torch.randn(shape)
    if way == "eager_cl":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    return {"model_mib": _peak_mib() - before, "process_mib": _peak_mib()}


def _export(name: str, shape: tuple[int, ...], file: Path) -> None:
    import torch
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).eval()
    torch.onnx.export(model, (torch.randn(shape),), str(file), dynamo=False, input_names=["x"], opset_version=17)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--onnx", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [(int(batch), 3, 224, 224) for batch in options.batches.split(",")]
    if options.child:
        found = (
            _onnxruntime(options.onnx, shapes[0])
            if options.child == "onnxruntime"
            else _torch(options.child, options.model, shapes[0])
        )
        print(json.dumps(found))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            file = Path(folder) / f"{shape[0]}.onnx"
            _export(options.model, shape, file)
            for way in WAYS:
                call = [sys.executable, __file__, "--model", options.model, "--batches", str(shape[0]), "--child", way]
                done = subprocess.run([*call, "--onnx", str(file)], capture_output=True, text=True, check=True)
                rows.append({"model": options.model, "batch": shape[0], "way": way} | json.loads(done.stdout.splitlines()[-1]))
    from dl4ds_kernels import benchmark

    save(RESULTS / "memory.json", {"schema": 1, "machine": benchmark.machine(), "threads": THREADS, "rows": rows})
    cells = [[f"{r['model']} batch {r['batch']}", r["way"], f"{r['model_mib']:.0f}", f"{r['process_mib']:.0f}"] for r in rows]
    print(markdown(["model", "way", "model MiB", "process MiB"], cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
