"""Probes: what the sites of a USAE have in common, measured on held-out rows."""

from .controls import Controls
from .evaluate import evaluate, label_within
from .exemplars import Exemplar, Exemplars, Overlap, find_exemplars
from .factors import FactorScores, Follows
from .fidelity import Fidelity, fidelity
from .firing import FiringCounts
from .natural import NaturalActivations, natural_activations
from .records import LatentRecord, PairRecord, finite, jsonable
from .report import UniversalityReport
from .rows import one_site_per_model
from .universality import CATEGORIES, co_firing, firing_entropy

__all__ = [
    "CATEGORIES",
    "Controls",
    "Exemplar",
    "Exemplars",
    "FactorScores",
    "Fidelity",
    "FiringCounts",
    "Follows",
    "LatentRecord",
    "NaturalActivations",
    "Overlap",
    "PairRecord",
    "UniversalityReport",
    "co_firing",
    "evaluate",
    "fidelity",
    "find_exemplars",
    "finite",
    "firing_entropy",
    "jsonable",
    "label_within",
    "natural_activations",
    "one_site_per_model",
]
