"""The Universal Sparse Autoencoder: kernels, model, losses, training, checkpoints."""

from .history import HistoryFile, read_history
from .kernels import Codes, Support, choose_kernel, select_topk
from .model import USAE, warn_without_bottleneck
from .reconstruction import Matrix, ReconstructionSums
from .train import StepRecord, TrainResult, train, train_steps, usae_for

__all__ = [
    "USAE",
    "Codes",
    "HistoryFile",
    "Matrix",
    "ReconstructionSums",
    "StepRecord",
    "Support",
    "TrainResult",
    "choose_kernel",
    "read_history",
    "select_topk",
    "train",
    "train_steps",
    "usae_for",
    "warn_without_bottleneck",
]
