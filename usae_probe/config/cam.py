"""The `[cam]` table."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from .tables import Table

CamMode = Literal["independent", "joint", "contrast"]


class CamConfig(Table):
    """`[cam]`: pictures that maximise a latent (Coordinated Activation Maximization), and exemplars beside them."""

    latents: str = Field(
        "top:8",
        description="top:8 (universal), specific:4 (of one model; both by energy), factors:8 (that follow a label), "
        "or numbers: 273,8",
    )
    modes: list[CamMode] = Field(
        ["independent", "joint"],
        min_length=1,
        description="independent: a picture per model; joint: one for all models; contrast: one per model that the "
        "others do not see",
    )
    parametrisation: Literal["fourier", "maco", "pixels"] = Field(
        "fourier", description="fourier; maco: phases alone, the magnitudes are those of the run's images; pixels"
    )
    start: Literal["noise", "exemplar"] = Field(
        "noise", description="noise, or exemplar: the image that fires the latent most (accentuation)"
    )
    place: str = Field(
        "centre", description="of sites with several rows per image: centre, 'row,column', or mean or max over all"
    )
    steps: int = Field(256, ge=1, description="steps of gradient ascent per picture, at most")
    lr: float = Field(0.05, gt=0, description="learning rate of Adam")
    shift: float = Field(0.06, ge=0, lt=0.5, description="random shift in every step, at most, as a share of the side")
    scale: float = Field(0.05, ge=0, lt=0.5, description="random change of scale in every step, at most")
    rotation: float = Field(5.0, ge=0, le=180, description="random rotation in every step, at most, in degrees")
    crop: float = Field(0.0, ge=0, lt=1, description="random crop in every step: share of the side left out, at most")
    noise: float = Field(0.0, ge=0, description="standard deviation of noise in every step; black to white is 1")
    tv: float = Field(0.0, ge=0, description="weight of the total variation, against σ of the latent")
    l2: float = Field(0.0, ge=0, description="weight of the squared distance from grey")
    spectrum: float = Field(0.0, ge=0, description="weight of the mean squared frequency of the picture's power")
    restarts: int = Field(1, ge=1, description="pictures per latent, each from a start of its own")
    diversity: float = Field(0.0, ge=0, description="weight of how alike a model sees the restarts, the latent aside")
    softmin: float = Field(1.0, gt=0, description="temperature of the soft minimum over sites in joint pictures, in σ")
    contrast: float = Field(2.0, ge=0, description="weight of the other models in contrast pictures")
    record_every: int = Field(1, ge=1, description="the other models look at the picture every so many steps")
    check_every: int = Field(16, ge=1, description="steps between looks at the plain picture; the best one is kept")
    patience: int = Field(4, ge=0, description="looks in a row without 1 % of gain that end the ascent; 0: never")
    enough: float = Field(
        0.0, ge=0, description="end a picture's ascent once it is so many times as strong as every image; 0: never"
    )
    controls: int = Field(100, ge=1, description="latents of like rates that a picture's activation is compared with")
    exemplars: int = Field(4, ge=1, description="images of the run shown beside each picture: those that fire it most")
    max_batch: int = Field(16, ge=1, description="pictures in one forward pass: bounds the memory")
    seed: int = Field(0, ge=0, description="seed of starts, transforms, and images that are drawn")

    @property
    def numbers(self) -> list[int]:
        """The latents that are asked for by number, each once; none for `top:8` and the like."""
        return [] if ":" in self.latents else list(dict.fromkeys(map(int, self.latents.split(","))))

    @property
    def at(self) -> tuple[int, int] | None:
        """Row and column of the place asked for; None for `centre`, `mean` and `max`."""
        row, comma, column = self.place.partition(",")
        return (int(row), int(column)) if comma else None

    @property
    def per_image(self) -> Literal["mean", "max"] | None:
        """How the rows of an image become one number; None where one of them is chosen."""
        return "mean" if self.place == "mean" else "max" if self.place == "max" else None

    @field_validator("latents")
    @classmethod
    def _spelled(cls, text: str) -> str:
        if not re.fullmatch(r"(top|specific|factors):[1-9]\d*|\d+( *, *\d+)*", text.strip()):
            raise ValueError("it names no latents")
        return text.strip()

    @field_validator("place")
    @classmethod
    def _place(cls, text: str) -> str:
        if not re.fullmatch(r"centre|mean|max|\d+ *, *\d+", text.strip()):
            raise ValueError("it names no place")
        return text.strip()

    @field_validator("modes")
    @classmethod
    def _once(cls, modes: list[CamMode]) -> list[CamMode]:
        return list(dict.fromkeys(modes))

    @model_validator(mode="after")
    def _together(self) -> CamConfig:
        if self.restarts > self.max_batch:
            raise ValueError(
                f"restarts = {self.restarts} do not fit in max_batch = {self.max_batch}: those of a latent are climbed "
                "together"
            )
        if self.diversity and self.restarts == 1:
            raise ValueError(f"diversity = {self.diversity} is over restarts, and restarts = 1")
        return self
