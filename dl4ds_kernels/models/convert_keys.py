"""State_dicts of other libraries, renamed to this package's keys.

torchvision's need nothing. Pre-activation ResNets have other names in timm (``resnetv2_*``, to load into ``stem="timm"``) and
in pytorchcv (``preresnet*``, ``stem="ptcv"``), whose post-activation and CIFAR nets are renamed too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors under this package's names; nothing is copied.

    Args:
        state_dict: of the other library's model.
        source: "timm_resnetv2", "ptcv_preresnet" (ImageNet and CIFAR), "ptcv_resnet" (bottleneck or basic blocks, ImageNet and
            CIFAR) or "torchvision" (nothing changes).

    Raises: ValueError for another source, or a key that it does not have (so that nothing is dropped without a word).
    """
    if source not in _RULES:
        raise ValueError(f"convert_state_dict: source: expected one of {', '.join(_RULES)}, got {source!r}")
    rule, out = _RULES[source], {}
    for key, value in state_dict.items():
        name = rule(key)
        if name is None:
            raise ValueError(f"convert_state_dict: state_dict: expected keys of {source}, got {key!r}")
        # pytorchcv's classifier may be a 1x1 convolution.
        out[name] = value.flatten(1) if name == "fc.weight" and value.dim() == 4 else value
    return out


def _timm_resnetv2(key: str) -> str | None:
    if key.startswith("stem.conv."):
        return "conv1." + key.removeprefix("stem.conv.")
    if key.startswith("head.fc."):
        return "fc." + key.removeprefix("head.fc.")
    if re.fullmatch(r"norm\.\w+", key):
        return key
    match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(norm|conv)([123])\.(\w+)", key)
    if match:
        stage, block, kind, number, rest = match.groups()
        return f"layer{int(stage) + 1}.{block}.{'bn' if kind == 'norm' else 'conv'}{number}.{rest}"
    match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.downsample\.conv\.(\w+)", key)
    return f"layer{int(match[1]) + 1}.{match[2]}.downsample.{match[3]}" if match else None


def _ptcv_common(key: str) -> str | None:
    if key.startswith("output."):
        return "fc." + key.removeprefix("output.")
    if key in ("features.init_block.weight", "features.init_block.conv.weight", "features.init_block.conv.conv.weight"):
        return "conv1.weight"
    match = re.fullmatch(r"features\.init_block\.(?:conv\.)?bn\.(\w+)", key)
    return f"bn1.{match[1]}" if match else None


def _ptcv_preresnet(key: str) -> str | None:
    common = _ptcv_common(key)
    if common is not None:
        return common
    match = re.fullmatch(r"features\.post_activ\.bn\.(\w+)", key)
    if match:
        return f"norm.{match[1]}"
    match = re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.body\.conv(\d)\.(bn|conv)\.(\w+)", key)
    if match:
        stage, unit, number, kind, rest = match.groups()
        return f"layer{stage}.{int(unit) - 1}.{kind}{number}.{rest}"
    match = re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.identity_conv\.(\w+)", key)
    return f"layer{match[1]}.{int(match[2]) - 1}.downsample.{match[3]}" if match else None


def _ptcv_resnet(key: str) -> str | None:
    common = _ptcv_common(key)
    if common is not None:
        return common
    match = re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.body\.conv(\d)\.(bn|conv)\.(\w+)", key)
    if match:
        stage, unit, number, kind, rest = match.groups()
        return f"layer{stage}.{int(unit) - 1}.{kind}{number}.{rest}"
    match = re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.identity_conv\.(bn|conv)\.(\w+)", key)
    if match:
        stage, unit, kind, rest = match.groups()
        return f"layer{stage}.{int(unit) - 1}.downsample.{0 if kind == 'conv' else 1}.{rest}"
    return None


_RULES: dict[str, Callable[[str], str | None]] = {
    "torchvision": lambda key: key,
    "timm_resnetv2": _timm_resnetv2,
    "ptcv_preresnet": _ptcv_preresnet,
    "ptcv_resnet": _ptcv_resnet,
}
