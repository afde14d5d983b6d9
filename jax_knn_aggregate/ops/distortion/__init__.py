"""The distortion losses of rays: the public functions."""

from .api import distortion_loss, eff_distloss, eff_distloss_native, flatten_distortion_loss, flatten_eff_distloss

__all__ = [
    "distortion_loss",
    "eff_distloss",
    "eff_distloss_native",
    "flatten_distortion_loss",
    "flatten_eff_distloss",
]
