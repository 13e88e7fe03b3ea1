"""The lecture's models, assembled from the package's fused layers.

    from dl4ds_kernels import models
    models.list_models()                    # every name; models.model_info(name) has counts and sources
    model = models.resnet50(num_classes=10) # or models.create("resnet50", num_classes=10)

Models with a torchvision name load torchvision's state_dicts strictly; :mod:`.convert_keys` knows other layouts. No weights are
downloaded.
"""

from . import alexnet as _alexnet
from . import cifar_resnet as _cifar_resnet
from . import deconvnet as _deconvnet
from . import densenet as _densenet
from . import hourglass as _hourglass
from . import preact_resnet as _preact_resnet
from . import resnet as _resnet
from . import unet as _unet
from . import unet3d as _unet3d
from . import vgg as _vgg
