"""The stock model of the demo: a torchvision classifier with the user's weights, or seeded random ones that behave."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from ._photo import augmented

SEED = 2015
RANDOM_NOTE = (
    f"Random weights (seed {SEED}), BatchNorm statistics calibrated on crops of the photo: class names below mean nothing, "
    "parity and speed are those of trained weights. Give --weights FILE for real predictions."
)
# Logits of a trained classifier spread about this much; an untrained last layer's would hardly differ from class to class.
_LOGIT_SPREAD = 3.0
_CALIBRATION_BATCHES, _CALIBRATION_IMAGES = 2, 8


class ModelError(Exception):
    """The model or its weights cannot be used; the message says why."""


def make_model(name: str, classes: int = 1000) -> nn.Module:
    """A torchvision classification model in eval mode, seeded random initialisation. ModelError for an unknown name."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(
            f"--model: expected a torchvision classification model such as {', '.join(_near(name, known))}; got {name!r}"
        )
    builder = torchvision.models.get_model_builder(name)
    # GoogLeNet's and Inception's own initialisation takes minutes and would be overwritten by the calibration anyway.
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    assert "weights" in inspect.signature(builder).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return builder(weights=None, num_classes=classes, **quick).eval()


def _near(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=5, cutoff=0.4) or ["resnet18", "resnet50", "vgg16_bn", "densenet121"]


def class_names(name: str) -> list[str]:
    """ImageNet class names from torchvision's own metadata (part of the package, no download)."""
    return list(torchvision.models.get_model_weights(name).DEFAULT.meta["categories"])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a torchvision state_dict strictly: .safetensors, or a torch file read with ``weights_only=True``."""
    state = _read_state(path)
    tensors = isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        got = f"a dict with {', '.join(map(repr, list(state)[:4]))}" if isinstance(state, dict) else type(state).__name__
        raise ModelError(f"--weights: expected a state_dict (names to tensors) in {path}, got {got}")
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(f"--weights: {path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=True)


def _read_state(path: Path) -> object:
    if not path.is_file():
        raise ModelError(f"--weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ModelError("--weights: .safetensors needs safetensors: pip install 'dl4ds_kernels[demo]'") from None
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"--weights: {path} is no plain tensor file (nothing else is read, for safety): {first}") from None
    except Exception as error:  # safetensors, zip and torch each have their own errors for damaged files
        raise ModelError(
            f"--weights: cannot read {path}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from None


@torch.no_grad()
def randomise(model: nn.Module, image: Image.Image) -> None:
    """Give a randomly initialised model the statistics of a trained one.

    BatchNorm scale and shift get a mild spread and the running statistics become those of augmented crops of ``image``; the
    last linear layer is scaled so that logits spread as a trained classifier's. Same model and photo, same weights.
    """
    g = torch.Generator().manual_seed(SEED)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for m in norms:
        if m.affine:
            m.weight.copy_(0.7 + 0.6 * torch.rand(m.weight.shape, generator=g))
            m.bias.copy_(0.1 * torch.randn(m.bias.shape, generator=g))
        m.reset_running_stats()
        m.momentum = None  # the average over all calibration batches
        m.train()
    for _ in range(_CALIBRATION_BATCHES if norms else 0):
        model(augmented(image, _CALIBRATION_IMAGES, g))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    spread = model(augmented(image, 2, g)).std().item()
    for m in last:
        if spread > 0:
            m.weight.mul_(_LOGIT_SPREAD / spread)
            if m.bias is not None:
                m.bias.mul_(_LOGIT_SPREAD / spread)
