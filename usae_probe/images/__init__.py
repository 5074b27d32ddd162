"""Pictures: where they come from, how they are decoded, and how they become model input."""

from __future__ import annotations

from .annotations import Annotation, annotations_of
from .decode import decode_file
from .loading import LoadedImages, SkippedImage, iter_batches, load_images
from .opaque import OpaqueTransform
from .preprocess import Preprocessing, at_size
from .sources import ArraySource, DatasetSource, FolderSource, HuggingFaceSource, ImageSource, open_source

__all__ = [
    "Annotation",
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "HuggingFaceSource",
    "ImageSource",
    "LoadedImages",
    "OpaqueTransform",
    "Preprocessing",
    "SkippedImage",
    "annotations_of",
    "at_size",
    "decode_file",
    "iter_batches",
    "load_images",
    "open_source",
]
