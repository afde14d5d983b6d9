"""Images of 3D Gaussians, differentiable in everything to any order."""

from .api import Rendering, render_gaussians

__all__ = ["Rendering", "render_gaussians"]
