"""Images of Gaussians."""
