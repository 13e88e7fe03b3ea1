"""YOLOv1: the paper's net, darknet's shipped net with the locally connected layer, and the tiny net.

Reference: Redmon et al., You Only Look Once: Unified, Real-Time Object Detection, 2016. The descriptions below are written out
from the paper's figure and darknet's layer lists, in darknet's own format, so that one builder serves them and users' files.
"""

from __future__ import annotations

from ._registry import register
from .darknet import DarknetNet

_SIZE = (3, 448, 448)
# (filters, size, stride) of the convolutions; "M": 2x2 pooling. The first twenty are pretrained as a classifier.
_TRUNK: tuple[tuple[int, int, int] | str, ...] = (
    (64, 7, 2), "M", (192, 3, 1), "M", (128, 1, 1), (256, 3, 1), (256, 1, 1), (512, 3, 1), "M",
    *(((256, 1, 1), (512, 3, 1)) * 4), (512, 1, 1), (1024, 3, 1), "M", *(((512, 1, 1), (1024, 3, 1)) * 2),
    (1024, 3, 1), (1024, 3, 2), (1024, 3, 1), (1024, 3, 1),
)  # fmt: skip
_TINY: tuple[tuple[int, int, int] | str, ...] = (
    (16, 3, 1), "M", (32, 3, 1), "M", (64, 3, 1), "M", (128, 3, 1), "M", (256, 3, 1), "M", (512, 3, 1), "M",
    (1024, 3, 1), (256, 3, 1),
)  # fmt: skip


def yolov1_cfg(kind: str = "paper", *, classes: int = 20) -> str:
    """The description of a net: "paper" (no BatchNorm, two boxes), "darknet" (BatchNorm, locally connected layer, three boxes)
    or "tiny" (BatchNorm, two boxes). ValueError for another kind."""
    if kind not in ("paper", "darknet", "tiny"):
        raise ValueError(f"yolov1_cfg: kind: expected 'paper', 'darknet' or 'tiny', got {kind!r}")
    boxes = 3 if kind == "darknet" else 2
    channels, height, width = _SIZE
    text = f"[net]\nheight={height}\nwidth={width}\nchannels={channels}\n"
    for layer in _TINY if kind == "tiny" else _TRUNK:
        if isinstance(layer, str):
            text += "\n[maxpool]\nsize=2\nstride=2\n"
        else:
            normalize = "" if kind == "paper" else "batch_normalize=1\n"
            filters, size, stride = layer
            text += f"\n[convolutional]\n{normalize}filters={filters}\nsize={size}\nstride={stride}\npad=1\nactivation=leaky\n"
    if kind == "paper":
        text += "\n[connected]\noutput=4096\nactivation=leaky\n\n[dropout]\nprobability=.5\n"
    elif kind == "darknet":
        text += "\n[local]\nfilters=256\nsize=3\nstride=1\npad=1\nactivation=leaky\n\n[dropout]\nprobability=.5\n"
    outputs = 49 * (boxes * 5 + classes)
    text += f"\n[connected]\noutput={outputs}\nactivation=linear\n"
    return text + f"\n[detection]\nclasses={classes}\ncoords=4\nside=7\nnum={boxes}\nsoftmax=0\nsqrt=1\nrescore=1\n"


@register("yolov1", "yolov1", 271_703_550, _SIZE, "paper, darknet 2015 yolo.cfg")
def yolov1(num_classes: int = 20) -> DarknetNet:
    """The paper's net: 24 convolutions with biases, two connected layers, 7 x 7 x (2 * 5 + 20) outputs."""
    return DarknetNet.from_text(yolov1_cfg("paper", classes=num_classes))


@register("yolov1_darknet", "yolov1", 197_301_875, _SIZE, "darknet yolov1.cfg")
def yolov1_darknet(num_classes: int = 20, *, bn: str = "cpu") -> DarknetNet:
    """The net that darknet ships: BatchNorm, a locally connected layer, three boxes a cell."""
    return DarknetNet.from_text(yolov1_cfg("darknet", classes=num_classes), bn=bn)


@register("yolov1_tiny", "yolov1", 27_095_374, _SIZE, "darknet yolov1-tiny.cfg")
def yolov1_tiny(num_classes: int = 20, *, bn: str = "cpu") -> DarknetNet:
    """The tiny net: eight convolutions with BatchNorm, two boxes a cell."""
    return DarknetNet.from_text(yolov1_cfg("tiny", classes=num_classes), bn=bn)
