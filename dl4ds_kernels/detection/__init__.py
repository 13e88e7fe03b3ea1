"""What belongs to detection models: post-processing and the bridge to torchvision."""

from .patch import patch_torchvision_nms

__all__ = ["patch_torchvision_nms"]
