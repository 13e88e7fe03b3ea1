"""What pose models need beside their layers: heatmaps, the loss over all stacks, PCK."""

from .heatmaps import combine_maximum, decode_heatmaps, encode_heatmaps, flip_heatmaps, to_image
from .loss import stacked_mse
from .pck import normalised_distance, pck

__all__ = [
    "combine_maximum",
    "decode_heatmaps",
    "encode_heatmaps",
    "flip_heatmaps",
    "normalised_distance",
    "pck",
    "stacked_mse",
    "to_image",
]
