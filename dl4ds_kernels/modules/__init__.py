"""Drop-in layers: torch's attribute names and state_dict keys, fused forward and backward."""

from .add_act import AddAct
from .bn_act import BNAct2d
from .conv_bn_act import ConvBNAct2d
from .conv_transpose_bn_act import ConvTransposeBNAct2d
from .local_response_norm import LocalResponseNorm
from .locally_connected import LocallyConnected2d
from .preact import BNActConv2d, PreActBasicBlock, PreActBottleneck
from .residual import BasicBlock, Bottleneck
from .residual_order import OrderedResidual2d
from .sequential import FusedSequential
from .sync_bn import SyncBNAct, convert_sync_batchnorm

__all__ = [
    "AddAct",
    "BNAct2d",
    "BNActConv2d",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "ConvTransposeBNAct2d",
    "FusedSequential",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "OrderedResidual2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SyncBNAct",
    "convert_sync_batchnorm",
]
