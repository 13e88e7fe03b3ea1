"""Training recipes: a model of this package, torch's own optimizer and DataLoader, a metric that it must reach.

from dl4ds_kernels import recipes
recipe = recipes.make("cifar", epochs=4)
history = recipes.train(recipe, "runs/cifar")            # again with the same folder: goes on where it stopped
net = recipes.trained("unet")                            # a small net with the weights that come with the package
"""

from __future__ import annotations

import importlib
from typing import Any

from ._train import Recipe, stock_layers, train
from ._trained import TRAINED, TrainedNet, save_half, trained

NAMES = ("cifar", "unet", "yolo", "hourglass")
# Data sets by name; anything else is a folder.
DATA = {"digits": "cifar", "mnist1d": "cifar", "skimage": "unet"}


def make(
    name: str,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data: str | None = None,
    quick: bool = False,
    small: bool = False,
) -> Recipe:
    """A recipe with its model, data and optimizer.

    Args: data: a folder of the user's files, or one of the recipe's named data sets; default: synthetic pictures. small: the
    narrow net of :func:`trained` (yolo, unet, hourglass).
    Raises: ValueError for an unknown name, ImportError for a data set whose package is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"recipes: name: expected one of {', '.join(NAMES)}, got {name!r}")
    options: dict[str, Any] = {"seed": seed, "data": data, "quick": quick}
    if small:
        if name not in TRAINED:
            raise ValueError(f"recipes: small: expected one of {', '.join(TRAINED)}, got {name!r}")
        options["small_net"] = True
    recipe = importlib.import_module(f".{name}", __name__).recipe(**options, **({} if epochs is None else {"epochs": epochs}))
    recipe.name += "-small" if small else f"-{data}" if data in DATA else ""  # a checkpoint of one is none of another
    return recipe


__all__ = ["DATA", "NAMES", "TRAINED", "Recipe", "TrainedNet", "make", "save_half", "stock_layers", "train", "trained"]
