"""Multilayer perceptrons with every usual activation, differentiable to any order."""

from .activations import LeakyReLU, Sine, Softplus, Squareplus
from .api import mlp

__all__ = ["LeakyReLU", "Sine", "Softplus", "Squareplus", "mlp"]
