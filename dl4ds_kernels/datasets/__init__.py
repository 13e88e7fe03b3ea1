"""Small data sets made from a seed, and readers for files that the user has. Nothing is downloaded."""

from .cells import cells
from .cifar import cifar
from .digits import digits
from .figures import figures
from .mnist1d import mnist1d
from .nuclei import nuclei
from .textures import textures
from .voc import Annotation, read_annotation, read_voc, shapes, write_annotation

__all__ = [
    "Annotation", "cells", "cifar", "digits", "figures", "mnist1d", "nuclei", "read_annotation", "read_voc", "shapes",
    "textures", "write_annotation",
]  # fmt: skip
