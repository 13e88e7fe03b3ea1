"""Small data sets made from a seed, and readers for files that the user has. Nothing is downloaded."""

from .cells import cells
from .cifar import cifar
from .figures import figures
from .textures import textures
from .voc import Annotation, read_annotation, read_voc, shapes, write_annotation

__all__ = ["Annotation", "cells", "cifar", "figures", "read_annotation", "read_voc", "shapes", "textures", "write_annotation"]
