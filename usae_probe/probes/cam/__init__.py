"""Coordinated Activation Maximization (CAM): pictures that maximise a latent in every model."""

from .ascent import CamPicture, CamProgress, PictureKey, StepCount, Studio, iter_pictures, latent_batches, maximize
from .heat import heat_maps
from .targets import chosen_targets
from .verdict import JUDGEMENTS, RULE, Verdict, best_restarts, judge, transfers
from .verify import CrossScore

__all__ = [
    "JUDGEMENTS",
    "RULE",
    "CamPicture",
    "CamProgress",
    "CrossScore",
    "PictureKey",
    "StepCount",
    "Studio",
    "Verdict",
    "best_restarts",
    "chosen_targets",
    "heat_maps",
    "iter_pictures",
    "judge",
    "latent_batches",
    "maximize",
    "transfers",
]
