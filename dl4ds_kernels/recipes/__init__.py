"""Training recipes: a model of this package, torch's own optimizer and DataLoader, a metric that it must reach.

from dl4ds_kernels import recipes
recipe = recipes.make("cifar", epochs=4)
history = recipes.train(recipe, "runs/cifar")            # again with the same folder: goes on where it stopped
"""

from __future__ import annotations

import importlib
from typing import Any

from ._train import Recipe, stock_layers, train

NAMES = ("cifar", "unet", "yolo", "hourglass")


def make(name: str, *, seed: int = 0, epochs: int | None = None, data: str | None = None, quick: bool = False) -> Recipe:
    """A recipe with its model, data and optimizer. ``data``: a folder of the user's files; default: synthetic pictures.

    Raises: ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"recipes: name: expected one of {', '.join(NAMES)}, got {name!r}")
    options: dict[str, Any] = {"seed": seed, "data": data, "quick": quick}
    return importlib.import_module(f".{name}", __name__).recipe(**options, **({} if epochs is None else {"epochs": epochs}))


__all__ = ["NAMES", "Recipe", "make", "stock_layers", "train"]
