"""Multiresolution hash grid encoding, differentiable to any order."""

from .api import hash_grid
from .grid import HashGrid

__all__ = ["HashGrid", "hash_grid"]
