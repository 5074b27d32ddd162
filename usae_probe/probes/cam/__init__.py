"""Coordinated Activation Maximization (CAM): pictures that maximise a latent in every model."""

from .ascent import CamPicture, CamProgress, iter_pictures, maximize

__all__ = ["CamPicture", "CamProgress", "iter_pictures", "maximize"]
