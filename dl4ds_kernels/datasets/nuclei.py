"""Cell nuclei of the immunohistochemistry picture that comes with scikit-image (no download)."""

from __future__ import annotations

import torch
from torch import Tensor

_SMOOTH = 1.5  # pixels
_SMALLEST = 40


def nuclei(*, train: bool = True, size: int = 64) -> tuple[Tensor, Tensor]:
    """Crops of a real microscope picture (512 x 512, colon tissue) and where its nuclei are.

    The reference is no annotation by hand but a classical segmentation: the haematoxylin channel of the colour deconvolution,
    smoothed, above Otsu's threshold, without specks.

    Args: train: overlapping crops of the left half, otherwise crops beside one another of the right half. size: of a crop.
    Returns: x (N, 3, size, size) float32 in [0, 1]; masks (N, size, size) int64, 1 on nuclei. Raises: ImportError without
    scikit-image; ValueError for ``size`` outside 16 … 256.
    """
    if not 16 <= size <= 256:
        raise ValueError(f"nuclei: size: expected 16 to 256, got {size}")
    try:
        from skimage import color, data, filters, measure
    except ImportError as error:
        raise ImportError("nuclei: needs scikit-image: pip install 'dl4ds_kernels[data]'") from error
    picture = data.immunohistochemistry()
    stain = filters.gaussian(color.rgb2hed(picture)[..., 0], _SMOOTH)
    regions = measure.label(stain > filters.threshold_otsu(stain))
    for region in measure.regionprops(regions):
        if region.area < _SMALLEST:
            regions[tuple(region.coords.T)] = 0
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
    mask = torch.from_numpy(regions > 0).long()
    half = x.shape[2] // 2
    columns, step = (slice(None, half), size // 2) if train else (slice(half, None), size)

    def crops(image: Tensor) -> Tensor:
        """(N, channels, size, size) of (channels, H, W)."""
        windows = image[..., columns].unfold(1, size, step).unfold(2, size, step)
        return windows.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()

    return crops(x), crops(mask.unsqueeze(0)).squeeze(1)
