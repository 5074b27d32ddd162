"""The tables of a config file: one frozen pydantic model each, every key documented."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ModelWrapValidatorHandler, field_validator, model_validator

from .recipes import weights, with_recipe
from .sparsities import check_matryoshka

DEFAULT_EPOCHS = 100.0
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|hpu|npu)(:\d+)?)$")]


class Table(BaseModel):
    """What all tables have in common: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    several: ClassVar[bool] = False
    """Whether it holds other tables, and its own checks are about several of them together."""


class ModelConfig(Table):
    """`[models.NAME]`: where one model comes from and which of its layers are looked at."""

    adapter: str = Field("timm", description="installed adapter that builds the model: timm, module, or a plug-in's")
    name: str = Field(
        description="the adapter's name for the model; module: 'file.py:factory' or 'package.mod:factory'"
    )
    layers: list[str] = Field(min_length=1, description="layer names or globs, with site suffixes: 'blocks.8@mean'")
    layout: dict[str, str] = Field(
        default_factory=dict,
        description="axes of layers, by name or glob, where they are not found: {'blocks.*' = 'cls+4+tokens'}",
    )
    pretrained: bool = Field(True, description="load the adapter's own weights (not used when checkpoint is given)")
    seed: int = Field(0, ge=0, description="seed of weights that are drawn at random (pretrained = false)")
    checkpoint: str | None = Field(None, description='local weights, .safetensors or .pth; "" is none')
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the adapter's factory")
    image_size: int | tuple[int, int] | None = Field(None, description="pixels; default: the model's own")
    mean: tuple[float, float, float] | None = Field(
        None, description="per channel, in [0, 1]; default: the model's own"
    )
    std: tuple[float, float, float] | None = Field(None, description="per channel; default: the model's own")
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Field(
        None, description="default: the model's own"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="share kept by the centre crop")
    device: Device = Field("auto", description="auto (CUDA if there is one), cpu, cuda, cuda:1, …")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="dtype of the forward pass")

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint(cls, given: str | None) -> str | None:
        return given or None  # so that a config can have "${WEIGHTS:-}"


class ImagesConfig(Table):
    """`[images]`: which pictures, and their split by image."""

    source: str = Field(
        description="folder (recursive), .npz/.npy of uint8 N,H,W,3, torchvision:CIFAR10, or datasets:NAME_OR_FOLDER"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of a data set by name: {root = 'data', train = false}, {split = 'train', image = 'img'}",
    )
    limit: int | None = Field(None, ge=1, description="images drawn by seed over the whole source; default: all")
    holdout: Share = Field(0.1, description="share of images kept for evaluation")
    validation: Share = Field(0.1, description="share of the training images kept for choices during training")
    seed: int = Field(0, description="seed of the draw")
    batch_size: int = Field(64, ge=1, description="images per forward pass")
    workers: int = Field(0, ge=0, description="threads that decode images; 0: the main thread does")
    strict: bool = Field(
        False, description="an image that cannot be decoded ends the harvest; else it is left out, and named"
    )


class BufferConfig(Table):
    """`[buffer]`: how activations lie on disk, and how they are read."""

    dtype: Literal["float16", "float32"] = Field("float16", description="dtype on disk")
    mode: Literal["store", "ring"] = Field(
        "store", description="store: keep all rows; ring: train while harvesting and drop training rows once used"
    )
    capacity: ByteSize | None = Field(
        None, description="ring: what it may take on disk, held-out rows included: 20GB, 512MiB"
    )
    online: bool = Field(False, description="store: train while harvesting (a ring always does)")
    reuse: int = Field(1, ge=1, description="times that a row is drawn in the pass that goes along with the harvest")
    warmup_rows: int = Field(
        65_536, ge=1, description="training rows whose mean and scale such a training goes by; it begins after them"
    )
    memory: ByteSize = Field(
        ByteSize(2**30),
        description="buffers up to this size are loaded whole; larger ones are shuffled in a pool of that size",
    )
    verify: Literal["first", "always", "never"] = Field(
        "first", description="when checksums are compared: as data are first read in a process, at every read, never"
    )
    shard_images: int = Field(
        512, ge=1, description="images per sealed shard, what a kill can cost; fewer where they would take over 128 MiB"
    )

    @property
    def trains_along(self) -> bool:
        """Whether training goes along with the harvest."""
        return self.online or self.mode == "ring"

    @model_validator(mode="after")
    def _ring(self) -> BufferConfig:
        if self.mode == "ring" and self.capacity is None:
            raise ValueError("mode = 'ring' needs a capacity: capacity = '20GB'")
        if self.mode == "store" and self.capacity is not None:
            raise ValueError("capacity bounds a ring: set mode = 'ring', or leave it out")
        if self.reuse > 1 and not self.trains_along:
            raise ValueError(f"reuse = {self.reuse} is for training along with the harvest: set online = true")
        return self


class UsaeConfig(Table):
    """`[usae]`: the shared dictionary."""

    n_latents: int = Field(2042, ge=1, description="latents of the shared code")
    k: int = Field(64, ge=1, description="active latents per row (batchtopk, jumprelu: in the mean; l1: not used)")
    sparsity: Literal["topk", "batchtopk", "jumprelu", "l1", "soft-topk", "global-topk"] = Field(
        "topk", description="how z_pre becomes z (see README)"
    )
    matryoshka: list[int] = Field(
        default_factory=list,
        description="nested dictionaries: the first 256, 512, … latents reconstruct too; the last is n_latents",
    )

    @model_validator(mode="after")
    def _k_fits(self) -> UsaeConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k = {self.k} is more than n_latents = {self.n_latents}: choose k well under it")
        return self

    @model_validator(mode="after")
    def _nested(self) -> UsaeConfig:
        check_matryoshka(self.matryoshka, self.n_latents, self.sparsity)
        return self


class TrainConfig(Table):
    """`[train]`: the optimisation of the USAE."""

    epochs: float | None = Field(None, gt=0, description="passes over the training rows; default 100 without steps")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(1024, ge=1, description="rows per step (all training rows when there are fewer)")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of Adam")
    lr_warmup: Share = Field(0.05, description="share of the steps in which the learning rate rises linearly")
    lr_final: float = Field(0.01, ge=0, le=1, description="learning rate at the end, as a share of lr (cosine)")
    recipe: Literal["default", "published"] = Field(
        "default", description="published: the training of arXiv 2502.03714, for comparison; sets the keys that make it"
    )
    loss: Literal["mse", "l1"] = Field(
        "mse", description="error per target: squared (1 for predicting the mean) or absolute"
    )
    site_weights: dict[str, float] | None = Field(
        None, description="weight of each target in the loss, {'vit/blocks.11' = 2.0}; 1 where none is given"
    )
    self_share: Share | Literal["auto", "equal"] = Field(
        "auto",
        description="share of the source's own error in the loss of M targets; auto: M / (2 M − 1); equal: 1 / M",
    )
    source: str | dict[str, float] = Field(
        "random", description="site whose code is decoded in a step: random, all, or {site = weight} of being drawn"
    )
    update: Literal["all", "source"] = Field(
        "all", description="source: a step changes the source's encoder and decoder only, as in the published code"
    )
    align_warmup: Share = Field(0.25, description="share of the steps with one support for all sites (see README)")
    align_sites: int = Field(
        3, ge=2, description="sites that share a support in such a step; of more sites so many are drawn each time"
    )
    aux_k: int = Field(32, ge=0, description="dead latents that model the residual; 0 switches it off")
    aux_coef: float = Field(1 / 32, ge=0, description="weight of that auxiliary loss")
    contrastive_coef: float = Field(0.0, ge=0, description="weight of InfoNCE between paired codes of different sites")
    contrastive_temperature: float = Field(0.1, gt=0, description="its temperature, for cosines")
    input_noise: float = Field(0.0, ge=0, description="Gaussian noise on the encoder's input, as a share of its spread")
    latent_dropout: Share | Literal["auto"] = Field(
        "auto",
        description="share of active latents left out in training; auto: 3.4 · mean d_in / training rows, at most .35",
    )
    init: Literal["random", "data"] = Field(
        "random", description="first decoder rows: random directions, or paired training rows drawn by seed"
    )
    anneal: Share = Field(0.5, description="share of the steps in which l1 rises to its weight, soft-topk becomes hard")
    temperature: float = Field(1.0, gt=0, description="soft-topk: temperature at the start, in units of z_pre")
    soft_width: float = Field(2.0, gt=1, description="soft-topk: latents in play while it is soft, in multiples of k")
    l1_coef: float = Field(0.2, ge=0, description="l1: weight of the code's decoded size (see README)")
    l0_coef: float = Field(1.0, ge=0, description="jumprelu: weight of (L0 / k − 1)²")
    bandwidth: float = Field(0.5, gt=0, description="jumprelu: bandwidth of the thresholds' straight-through gradient")
    dead_after: int = Field(50, ge=1, description="steps without firing in any site after which a latent is dead")
    weight_decay: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="decoupled weight decay of the encoders; auto: 60 · d_in / training rows, by site, at most .2 / lr",
    )
    grad_clip: float = Field(1.0, gt=0, description="bound of the gradient norm")
    kernel: Literal["auto", "reference", "csr", "triton"] = Field(
        "auto", description="how codes are computed and decoded: triton on CUDA, csr on CPU, reference anywhere"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="factors of the encoder product; bf16 decides which latents are active, not their values"
    )
    pairing: Literal["image", "label", "shuffled"] = Field(
        "image", description="controls: rows of different sites paired at random, or so among those with equal labels"
    )
    log_every: int = Field(10, ge=1, description="steps between records of history.jsonl")
    validate_every: int = Field(100, ge=0, description="steps between R² on validation rows; 0: only at the end")
    early_stop: int = Field(
        0, ge=0, description="stop after so many validations in a row without a better mean cross-R²; 0: never"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights that the run keeps: of the last step, or of the best validation cross-R²"
    )
    ema: Share = Field(0.0, description="decay per step of an average of the weights that takes their place; 0: none")
    workers: int = Field(0, ge=0, description="threads that read the next batches meanwhile; the batches are the same")
    tensorboard: bool = Field(False, description="write records to tensorboard/ in the run folder too")
    device: Device = Field("auto", description="auto (CUDA if there is one), cpu, cuda, cuda:1, …")
    seed: int = Field(0, description="seed of initialisation, batches and sources")

    @model_validator(mode="wrap")
    @classmethod
    def _recipe(cls, data: Any, handler: ModelWrapValidatorHandler[TrainConfig]) -> TrainConfig:
        if not isinstance(data, dict):
            return handler(data)
        made = handler(with_recipe(data))
        made.model_fields_set.intersection_update(data)  # what a recipe sets does not stay when the recipe is changed
        return made

    @field_validator("source", mode="before")
    @classmethod
    def _source(cls, source: Any) -> Any:
        if isinstance(source, dict):
            return weights(source)
        if source not in ("random", "all"):
            raise ValueError("Input should be 'random' or 'all', or a table {site = weight}")
        return source

    @field_validator("site_weights", mode="before")
    @classmethod
    def _site_weights(cls, given: Any) -> Any:
        return weights(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"both epochs = {self.epochs} and steps = {self.steps} are given: keep one")
        return self

    @model_validator(mode="after")
    def _validations(self) -> TrainConfig:
        if not self.validate_every and (self.early_stop or self.keep == "best"):
            key = f"early_stop = {self.early_stop}" if self.early_stop else "keep = 'best'"
            raise ValueError(f"{key} goes by validations, which validate_every = 0 leaves out: set it above 0")
        return self

    @property
    def changed(self) -> set[str]:
        """The keys whose value is not the default."""
        return {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.get_default()}

    def n_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of this run, given how many one pass over the training rows takes."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or DEFAULT_EPOCHS) * steps_per_epoch))


class ProbesConfig(Table):
    """`[probes]`: the measures and their thresholds."""

    sites: list[str] | None = Field(None, description="one site per model for the classes; default: the last listed")
    tau: float = Field(0.0, ge=0, description="a latent fires where z > tau")
    min_fires: int = Field(10, ge=1, description="held-out images in which a latent must fire to count for a site")
    min_rate_ratio: float = Field(0.1, ge=0, le=1, description="and share of the rate in its busiest site")
    entropy: float = Field(0.9, ge=0, le=1, description="firing entropy of a universal latent")
    phi: float = Field(0.2, ge=0, le=1, description="φ of co-firing of a universal or partial latent")
    q: float = Field(0.01, gt=0, lt=1, description="false-discovery rate of the co-firing test")
    split_cosine: float = Field(0.9, gt=0, le=1, description="cosine of decoder rows that marks split latents")
    train_rows: int = Field(20_000, ge=1, description="training rows that the training R² is computed on, at most")
    auroc: float = Field(0.9, ge=0.5, le=1, description="AUROC in every model with which a latent follows a label")
    seed: int = Field(0, ge=0, description="seed of drawn rows (@patch, @all), nulls, resamples and images")
    nulls: int = Field(20, ge=0, description="pairings of held-out images at random that everything stands beside")
    bootstrap: int = Field(1000, ge=0, description="resamples of images behind the intervals; 0: none")
    within: str | None = Field(
        None, description="label within which images are exchanged, too; default: the first there is"
    )
    linear: bool = Field(True, description="ridge regression between sites, the reference of cross-R²")
    similarity_images: int = Field(4096, ge=0, description="held-out images for CKA and mutual k-NN; 0: none")
    neighbours: int = Field(10, ge=1, description="k of mutual k-NN")
    fidelity_images: int = Field(256, ge=0, description="held-out images for splicing into the live models; 0: none")
    fidelity_latents: int = Field(16, ge=0, description="universal latents that are ablated in all models")
    controls: bool = Field(
        False, description="train what the figures are to be believed by: controls, independent SAEs, other seeds"
    )
    seeds: int = Field(3, ge=1, description="trainings, this one included, behind ranges over seeds (with controls)")
