"""Small data sets made from a seed, and readers for files that the user has. Nothing is downloaded."""

from .textures import textures

__all__ = ["textures"]
