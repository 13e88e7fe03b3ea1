"""Loads a photograph and prepares it as torchvision's ImageNet models expect."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as TF

RESIZE, CROP = 256, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A long thin picture would be resized to gigabytes (the shorter side becomes 256 pixels).
_MAX_ASPECT = 20


class PhotoError(Exception):
    """The picture cannot be used; the message says why."""


def default_photo() -> Path:
    """The cat ``chelsea.png``, a CC0 photograph that is part of scikit-image's wheel (no download)."""
    spec = importlib.util.find_spec("skimage")
    path = Path(spec.origin).parent / "data" / "chelsea.png" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise PhotoError("the default photo comes with scikit-image: pip install 'dl4ds_kernels[demo]', or give --image PATH")
    return path


def load_photo(path: Path) -> Image.Image:
    """RGB image, upright. PhotoError for a file that is missing, not a picture, damaged, or of extreme shape."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise PhotoError(f"--image: no such file: {path}") from None
    except IsADirectoryError:
        raise PhotoError(f"--image: expected a picture, got a folder: {path}") from None
    except Image.UnidentifiedImageError:
        raise PhotoError(f"--image: not a picture that Pillow can read: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise PhotoError(f"--image: cannot read {path}: {error}") from None
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise PhotoError(f"--image: expected sides within 1:{_MAX_ASPECT}, got {image.width} x {image.height}: {path}")
    return image


def _normalised(image: Image.Image) -> Tensor:
    """(1, 3, H, W) fp32."""
    x = TF.convert_image_dtype(TF.pil_to_tensor(image), torch.float32)
    return TF.normalize(x, _MEAN, _STD).unsqueeze(0)


def resized(image: Image.Image) -> Image.Image:
    """The shorter side becomes 256 pixels, bilinear with antialiasing."""
    return TF.resize(image, [RESIZE])


def cropped(image: Image.Image) -> Image.Image:
    """What the network sees: the central 224 x 224 pixels of the resized picture."""
    return TF.center_crop(resized(image), [CROP])


def preprocess(image: Image.Image) -> Tensor:
    """(1, 3, 224, 224) fp32: resize 256, crop 224, normalise."""
    return _normalised(cropped(image))


def views(image: Image.Image) -> list[Tensor]:
    """The preprocessed picture, its mirror image and its four corner crops: the inputs on which parity is judged."""
    corners = TF.five_crop(resized(image), [CROP])[:4]
    return [preprocess(image), preprocess(ImageOps.mirror(image)), *map(_normalised, corners)]


def augmented(image: Image.Image, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 224, 224): random crops of 30 to 100 % of the picture, mirrored at random, with a little noise."""
    found = []
    for _ in range(count):
        scale, left, top, mirror = torch.rand(4, generator=generator).tolist()
        side = max(1, int(min(image.size) * (0.3 + 0.7 * scale) ** 0.5))
        x, y = int(left * (image.width - side)), int(top * (image.height - side))
        crop = image.resize((CROP, CROP), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        found.append(_normalised(ImageOps.mirror(crop) if mirror > 0.5 else crop))
    batch = torch.cat(found)
    return batch + 0.1 * torch.randn(batch.shape, generator=generator)


def data_uri(image: Image.Image, width: int) -> str:
    """A JPEG of at most ``width`` pixels as a data URI for the report."""
    image = image.copy()
    image.thumbnail((width, 2 * width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
