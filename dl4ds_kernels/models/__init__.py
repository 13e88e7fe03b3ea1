"""The lecture's models, assembled from the package's fused layers.

    from dl4ds_kernels import models
    models.list_models()                     # every name; models.model_info(name) has counts and sources
    model = models.resnet50(num_classes=10)  # or models.create("resnet50", num_classes=10)

Models with a torchvision name load torchvision's state_dicts strictly; ``convert_state_dict`` knows timm's and pytorchcv's
layouts, ``fb_state_dict`` fb.resnet.torch's. ``load_checkpoint`` reads .safetensors, torch.save and Torch7 files. Nothing is
downloaded.
"""

# ruff: noqa: F401
from ._registry import ModelInfo, build_on_meta, count_parameters, create, list_models, model_info
from .alexnet import AlexNet, AlexNetPaper, alexnet, alexnet_paper
from .checkpoints import load_checkpoint, read_state_dict, save_checkpoint
from .cifar_resnet import (
    CifarPreActResNet,
    CifarResNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_plain110,
    cifar_preact164,
    cifar_preact1001,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from .convert_keys import convert_state_dict
from .crops import five_crops, multi_crop, ten_crops
from .darknet import DarknetNet, darknet_input
from .deconvnet import DeconvNet, deconvnet
from .densenet import (
    DenseNet,
    cifar_densenet,
    cifar_densenet40_k12,
    cifar_densenet100_k12,
    cifar_densenet100_k12_bc,
    cifar_densenet100_k24,
    cifar_densenet190_k40_bc,
    cifar_densenet250_k24_bc,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
)
from .fb_resnet import fb_state_dict
from .hourglass import (
    Hourglass,
    StackedHourglass,
    hourglass,
    hourglass1,
    hourglass2,
    hourglass4,
    hourglass8,
    hourglass8_wide,
)
from .macs import count_macs, macs
from .preact_resnet import (
    PreActResNet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
)
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152, resnet200
from .torch7 import load_t7
from .unet import UNet, unet, unet_bn, unet_bn_bilinear
from .unet3d import UNet3d, unet3d
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from .yolov1 import yolov1, yolov1_cfg, yolov1_darknet, yolov1_tiny
