"""Images of 3D Gaussians, differentiable in everything to any order."""

from .api import Rendering, render_gaussians
from .files import Gaussians, load_gaussians, save_gaussians

__all__ = ["Gaussians", "Rendering", "load_gaussians", "render_gaussians", "save_gaussians"]
