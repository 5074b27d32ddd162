"""The Universal Sparse Autoencoder: kernels, model, losses, training, checkpoints."""

from ..world import World
from .bottleneck import warn_without_bottleneck
from .draws import demand_labels, exchanged, sources_of
from .history import HistoryFile, read_history
from .independent import encoder_updates, train_independent
from .kernels import Codes, Support, choose_kernel, select_topk
from .model import USAE
from .reconstruction import Matrix, ReconstructionSums, empty_matrix
from .records import StepRecord, TrainResult
from .sharing import export_sae, site_weights
from .start import usae_for
from .tensorboard import TensorBoardCallback, check_tensorboard
from .train import train, train_steps

__all__ = [
    "USAE",
    "Codes",
    "HistoryFile",
    "Matrix",
    "ReconstructionSums",
    "StepRecord",
    "Support",
    "TensorBoardCallback",
    "TrainResult",
    "World",
    "check_tensorboard",
    "choose_kernel",
    "demand_labels",
    "empty_matrix",
    "encoder_updates",
    "exchanged",
    "export_sae",
    "read_history",
    "select_topk",
    "site_weights",
    "sources_of",
    "train",
    "train_independent",
    "train_steps",
    "usae_for",
    "warn_without_bottleneck",
]
