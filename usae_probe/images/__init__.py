"""Pictures: where they come from, how they are decoded, and how they become model input."""

from __future__ import annotations

from .loading import LoadedImages, SkippedImage, iter_batches, load_images
from .opaque import OpaqueTransform
from .preprocess import Preprocessing
from .sources import ArraySource, DatasetSource, FolderSource, ImageSource, open_source

__all__ = [
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "ImageSource",
    "LoadedImages",
    "OpaqueTransform",
    "Preprocessing",
    "SkippedImage",
    "iter_batches",
    "load_images",
    "open_source",
]
