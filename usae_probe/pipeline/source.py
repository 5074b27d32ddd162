"""The images of a run, when a later stage looks at them again."""

from __future__ import annotations

import warnings

import numpy as np

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import BufferMismatchError, ConfigError, ImageError, UsaeProbeWarning
from ..images import ImageSource, annotations_of, open_source
from ..probes import label_within
from ..usae import demand_labels


def images_of(config: RunConfig) -> ImageSource:
    """Open the images that a config names.

    Raises:
        ImageError, UsageError: see `open_source`.
    """
    return open_source(config.image_path, options=config.image_options)


def demand_same_images(source: ImageSource, buffer: ActivationBuffer) -> None:
    """Check that a source holds the images that a buffer was made of.

    Raises:
        BufferMismatchError: with both fingerprints.
    """
    now, then = source.fingerprint(), buffer.source["fingerprint"]
    if now != then:
        raise BufferMismatchError(
            f"the buffer {buffer.path} was made of other images than those of {source.location}: source.fingerprint: "
            f"{then[:16]}… on disk, {now[:16]}… now; source.n_images: {buffer.source['n_images']} on disk, "
            f"{len(source)} now",
            hint="put the images back as they were, or harvest into another folder (--out), or delete the buffer",
        )


def same_source(config: RunConfig, buffer: ActivationBuffer) -> ImageSource | None:
    """Open the images that were harvested; None, with a warning, when they are not there.

    Raises:
        BufferMismatchError: when they are not the same any more.
    """
    try:
        source = images_of(config)
    except (ImageError, OSError) as error:
        warnings.warn(f"labels and images of {config.image_path} are left out: {error}", UsaeProbeWarning, stacklevel=2)
        return None
    demand_same_images(source, buffer)
    return source


def labelled_source(config: RunConfig) -> ImageSource:
    """Open the images, before anything is made of them, and check that they have the labels that the config asks for.

    Raises:
        ConfigError: when rows are to be exchanged within labels, and the images have none.
        UsageError: when they have others than the one that is asked for.
    """
    source = images_of(config)
    if config.probes.within or config.train.pairing == "label":
        found = label_within(annotations_of(source), config.probes.within)
        if found is None and config.probes.within:
            raise ConfigError(
                f"probes.within names '{config.probes.within}', but nothing is known about the images of "
                f"{source.location}",
                hint="use class folders, or label arrays in an .npz; or leave it out",
            )
        demand_labels(config.train, None if found is None else found.values)
    return source


def labels_of(config: RunConfig) -> np.ndarray | None:
    """Return the label of every image that training pairs rows by; None where it does not, or where there is none."""
    if config.train.pairing != "label":
        return None
    found = label_within(annotations_of(images_of(config)), config.probes.within)
    return None if found is None else found.values
