"""The images of a run, when a later stage looks at them again."""

from __future__ import annotations

import warnings

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import ImageError, UsaeProbeWarning
from ..images import ImageSource, open_source


def same_source(config: RunConfig, buffer: ActivationBuffer) -> ImageSource | None:
    """Open the images that were harvested; None, with a warning, when they are not there or not the same any more."""
    try:
        source = open_source(config.image_path)
        if source.fingerprint() == buffer.source["fingerprint"]:
            return source
        reason = "it holds other pictures than those that were harvested"
    except (ImageError, OSError) as error:
        reason = str(error)
    warnings.warn(f"labels and images of {config.image_path} are left out: {reason}", UsaeProbeWarning, stacklevel=2)
    return None
