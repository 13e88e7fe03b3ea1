"""Drop-in layers: torch's attribute names and state_dict keys, fused forward and backward."""

from .add_act import AddAct
from .bn_act import BNAct2d
from .conv_bn_act import ConvBNAct2d

__all__ = ["AddAct", "BNAct2d", "ConvBNAct2d"]
