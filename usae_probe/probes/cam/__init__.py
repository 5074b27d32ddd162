"""Coordinated Activation Maximization (CAM): pictures that maximise a latent in every model."""

from .ascent import CamPicture, CamProgress, PictureKey, StepCount, Studio, iter_pictures, latent_batches, maximize
from .targets import chosen_targets
from .verify import CrossScore

__all__ = [
    "CamPicture",
    "CamProgress",
    "CrossScore",
    "PictureKey",
    "StepCount",
    "Studio",
    "chosen_targets",
    "iter_pictures",
    "latent_batches",
    "maximize",
]
