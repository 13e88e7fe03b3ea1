"""Writes and executes the notebooks of the tour: ``python docs/tour/make.py [name …]``. The tests execute what is committed."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

RESIDUAL = [
    "# Residual blocks and BatchNorm\n\nA residual block computes `relu(f(x) + x)`. What the block adds to its "
    "convolutions is memory "
    "traffic: BatchNorm, addition and activation are passes over tensors that do not fit a cache. Here the passes are "
    "counted, fused, "
    "and checked.",
    """import torch
import torch.nn.functional as TF

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

_ = torch.manual_seed(0)""",
    "## BatchNorm is a scale and a shift\n\nIn inference the statistics are constants, so BatchNorm is `x * scale + "
    "shift` a channel, and the "
    "convolution before it can take both.",
    """conv, bn = torch.nn.Conv2d(16, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32).eval()
with torch.no_grad():
    bn.running_mean.normal_(0, 0.5), bn.running_var.uniform_(0.5, 2), bn.weight.uniform_(0.5, 1.5), bn.bias.normal_()
    x = torch.randn(2, 16, 28, 28)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    folded = torch.conv2d(x, conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale, padding=1)
    stock = bn(conv(x))
print("largest difference:", f"{(folded - stock).abs().max():.1e}")
assert torch.allclose(folded, stock, atol=1e-5)""",
    "## One pass instead of three\n\n`F.bn_act` does BatchNorm, residual and activation at once. In training it also "
    "computes the batch "
    "statistics, updates the running ones as PyTorch does, and has its own backward.",
    """shape = (8, 32, 28, 28)
x, identity = (torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
gamma, beta = torch.rand(32).requires_grad_(), torch.randn(32).requires_grad_()
dout = torch.randn(shape)

def run(fused):
    mean, var = torch.zeros(32), torch.ones(32)
    if fused:
        out = F.bn_act(x, mean, var, gamma, beta, residual=identity, training=True)
    else:
        out = torch.relu(TF.batch_norm(x, mean, var, gamma, beta, training=True) + identity)
    return out, mean, var, *torch.autograd.grad(out, (x, identity, gamma, beta), dout)

names = ("out", "running_mean", "running_var", "dx", "dresidual", "dgamma", "dbeta")
for name, ours, theirs in zip(names, run(True), run(False)):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name:13} {error:.1e}")
    assert error < 1e-5""",
    "## What the skip does to the gradient\n\nThe lecture's question: why are 50 plain layers hard to train? Each "
    "plain layer "
    "multiplies the gradient; a skip adds one instead. We send a gradient through 30 layers of each kind.",
    """import matplotlib.pyplot as plt

def gradient_norms(skip, depth=30, width=16):
    torch.manual_seed(1)
    layers = [torch.nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.5 * (2 / (9 * width)) ** 0.5)  # half of He's: signals shrink
    x = torch.randn(4, width, 16, 16, requires_grad=True)
    maps = [x]
    for layer in layers:
        y = layer(maps[-1])
        maps.append(F.add_act(y, maps[-1]) if skip else torch.relu(y))
        maps[-1].retain_grad()
    maps[-1].square().mean().sqrt().backward()
    return [m.grad.norm().item() for m in maps]

plain, residual = gradient_norms(False), gradient_norms(True)
figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.semilogy(plain, "o-", ms=3, color="#94a3b8", label="plain")
axes.semilogy(residual, "o-", ms=3, color="#0f766e", label="with skip")
axes.set(xlabel="layer (the loss is at the right)", ylabel="norm of the gradient")
axes.legend(frameon=False)
plain_ratio, residual_ratio = plain[0] / plain[-1], residual[0] / residual[-1]
print(f"gradient at layer 0 over layer 30: plain {plain_ratio:.1e}, with skip {residual_ratio:.2g}")
assert plain_ratio < 1e-6 < 1e-2 < residual_ratio""",
    "## A whole network\n\n`dk.optimize` finds these chains in a model by data flow and keeps type and parameters.",
    """model = dk.models.cifar_resnet20().eval()
stock = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
fused = dk.optimize(stock)
print(fused.dl4ds_report)
assert type(fused) is type(stock) and list(fused.state_dict()) == list(stock.state_dict())
x = torch.randn(1, 3, 32, 32)
with torch.no_grad():
    assert torch.allclose(fused(x), stock(x), atol=1e-5)
    print("cifar_resnet20:", tuple(model(x).shape), dk.models.count_parameters(model), "parameters")""",
]

DETECTION = [
    "# From grid to boxes\n\nYOLOv1 predicts, for each of 7 x 7 cells, two boxes with a confidence and 20 class "
    "probabilities: one vector of "
    "1470 numbers. We build such a vector by hand, decode it, and suppress duplicates.",
    """import matplotlib.pyplot as plt
import torch

from dl4ds_kernels import functional as F
from dl4ds_kernels.detection import YoloLayout, decode, detect

layout = YoloLayout()
print(layout, "->", layout.outputs, "numbers an image")
assert layout.outputs == 7 * 7 * (2 * 5 + 20)""",
    "## A vector with two objects\n\nA dog seen by two neighbouring cells, and a bicycle. Width and height are stored "
    "as square roots, as darknet "
    "does: an error of a few pixels weighs more in a small box.",
    """output = torch.zeros(1, layout.outputs)
classes, confidences, boxes = layout.split(output)
def put(cell, box, label, confidence, x, y, w, h):
    classes[0, cell, label], confidences[0, cell, box] = 1.0, confidence
    boxes[0, cell, box] = torch.tensor([x, y, w**0.5, h**0.5])
put(3 * 7 + 3, 0, 11, 0.9, 0.5, 0.5, 0.40, 0.50)   # dog
put(3 * 7 + 4, 0, 11, 0.7, -0.3, 0.5, 0.42, 0.52)  # the same dog, from the cell beside
put(5 * 7 + 1, 1, 1, 0.8, 0.4, 0.2, 0.25, 0.20)    # bicycle
all_boxes, scores = decode(output, layout, (448, 448))
print(tuple(all_boxes.shape), tuple(scores.shape), "boxes with a score above 0.2:", int((scores > 0.2).sum()))
assert int((scores > 0.2).sum()) == 3""",
    "## Suppression\n\n`detect` thresholds and runs class-wise NMS. The weaker dog overlaps the stronger one and goes.",
    """found = detect(output, layout, (448, 448), score_threshold=0.2, iou_threshold=0.5)[0]
for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
    print([round(v) for v in box], f"{score:.2f}", label)
assert found.labels.tolist() == [11, 1]""",
    """figure, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
flat, best = all_boxes[0], scores[0].max(-1).values
for ax, rows, title in ((axes[0], flat[best > 0.2], "decoded"), (axes[1], found.boxes, "after NMS")):
    ax.set(xlim=(0, 448), ylim=(448, 0), xticks=range(0, 449, 64), yticks=range(0, 449, 64), title=title)
    ax.grid(color="#dbe3ec"), ax.tick_params(labelbottom=False, labelleft=False)
    for x1, y1, x2, y2 in rows.tolist():
        ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="#0f766e", linewidth=2))
    ax.set_aspect("equal")""",
    "## Many boxes\n\nNMS is index for index torchvision's. Its relatives soften the decision: Soft-NMS lowers the "
    "score of a neighbour "
    "instead of dropping it.",
    """import torchvision

g = torch.Generator().manual_seed(0)
centres = torch.rand(40, 2, generator=g)[torch.randint(40, (2000,), generator=g)] * 448 + torch.randn(2000, 2, generator=g) * 6
half = 20 + 20 * torch.rand(2000, 2, generator=g)
crowd, score = torch.cat([centres - half, centres + half], 1), torch.rand(2000, generator=g)
keep = F.nms(crowd, score, 0.5)
assert torch.equal(keep, torchvision.ops.nms(crowd, score, 0.5))
soft, soft_scores = F.soft_nms(crowd, score, score_threshold=0.2)
print(len(keep), "boxes kept by NMS;", len(soft), "of Soft-NMS above 0.2;", "matrix NMS above 0.2:",
      int((F.matrix_nms(crowd, score) > 0.2).sum()))""",
    "## A fixed number\n\nFor `torch.compile` and export the number of results must not depend on the data.",
    """keep, count = F.nms_padded(crowd[None], score[None], iou_threshold=0.5, max_output=50)
print(tuple(keep.shape), "valid:", count.tolist())
assert torch.equal(keep[0, : int(count)], F.nms(crowd, score, 0.5)[: int(count)])""",
]

SEGMENTATION = [
    "# Pooling switches and unpooling\n\nSegmentation networks go down and up again. DeconvNet remembers where each "
    "maximum was; U-Net "
    "concatenates; a hourglass adds the enlarged map to the skip.",
    """import matplotlib.pyplot as plt
import torch

from dl4ds_kernels import functional as F
from dl4ds_kernels.segmentation import class_iou, confusion_matrix, mean_iou""",
    "## Switches\n\nA place within a 2 x 2 window is a number from 0 to 3: one byte, where torch keeps eight.",
    """image = torch.zeros(1, 1, 16, 16)
rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
image[0, 0] = torch.exp(-((rows - 6) ** 2 + (columns - 9) ** 2) / 12)
pooled, where = F.max_pool_indices(image)
back = F.max_unpool(pooled, where)
nearest = torch.nn.functional.interpolate(pooled, scale_factor=2.0)
print("switches:", where.dtype, tuple(where.shape), "values", sorted(where.unique().tolist()))
assert torch.equal(back[back > 0], image[back > 0]), "every maximum is back at its own pixel"

figure, axes = plt.subplots(1, 4, figsize=(8, 2.3), layout="constrained")
for ax, picture, title in zip(axes, (image, pooled, back, nearest), ("input", "pooled", "unpooled", "nearest"), strict=True):
    ax.imshow(picture[0, 0], vmin=0, vmax=1), ax.set(title=title, xticks=[], yticks=[])""",
    "## The peak stays where it was\n\nUnpooling keeps positions that nearest enlargement loses: compare the centre "
    "of the largest value.",
    """def peak(picture):
    return divmod(int(picture.flatten().argmax()), picture.shape[-1])
print("input", peak(image), "unpooled", peak(back), "nearest", peak(nearest))
assert peak(back) == peak(image)""",
    "## Up and add in one pass\n\nA hourglass adds the enlarged low map to its skip; the enlarged map is never written.",
    """low, skip = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 16, 16)
fused = F.upsample_add(low, skip)
assert torch.equal(fused, skip + torch.nn.functional.interpolate(low, scale_factor=2.0))
print("bytes moved:", (low.numel() + 2 * skip.numel()) * 4, "instead of", (low.numel() + 4 * skip.numel()) * 4)""",
    "## Scoring\n\nMean IoU from one confusion matrix; a class that never occurs does not count.",
    """target = (image[0, 0] > 0.4).long()
for name, picture in (("unpooled", back), ("nearest", nearest)):
    confusion = confusion_matrix((picture[0, 0] > 0.4).long()[None], target[None], 2)
    print(f"{name:9} IoU by class {[round(v, 3) for v in class_iou(confusion).tolist()]}, mean {mean_iou(confusion):.3f}")
perfect = confusion_matrix(target[None], target[None], 2)
assert mean_iou(perfect) == 1.0""",
]

NOTEBOOKS = {"residual": RESIDUAL, "detection": DETECTION, "segmentation": SEGMENTATION}


def build(name: str) -> nbformat.NotebookNode:
    """Cells of one notebook: texts that begin with # (a heading) are Markdown."""
    cells = []
    for index, text in enumerate(NOTEBOOKS[name]):
        kind = nbformat.v4.new_markdown_cell if text.startswith("#") else nbformat.v4.new_code_cell
        cells.append(kind(text, id=f"{name}-{index}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a fresh kernel; an exception in one of them is raised here."""
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()


def main() -> None:
    for name in sys.argv[1:] or NOTEBOOKS:
        notebook = execute(build(name))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of a run, different every time
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get("data", {}) else None
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
