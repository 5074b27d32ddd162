"""A whole config file: read, checked, and every key of it by name."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ByteSize, Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from ..errors import ConfigError, nearest
from ..sites import Site, check_model_name
from .cam import CamConfig
from .checks import checked, field_at, settled
from .report import ReportConfig
from .scan import ScanConfig
from .sparsities import check_used
from .sweep import PublishedConfig, SweepConfig
from .tables import (
    BufferConfig,
    ImagesConfig,
    ModelConfig,
    ProbesConfig,
    Table,
    TrainConfig,
    UsaeConfig,
)

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


class RunConfig(Table):
    """A whole config file."""

    several: ClassVar[bool] = True
    models: dict[str, ModelConfig] = Field(min_length=1, description="the models, by name")
    images: ImagesConfig
    buffer: BufferConfig = BufferConfig()
    usae: UsaeConfig = UsaeConfig()
    train: TrainConfig = TrainConfig()
    probes: ProbesConfig = ProbesConfig()
    cam: CamConfig = CamConfig()
    scan: ScanConfig = ScanConfig()
    report: ReportConfig = ReportConfig()
    sweep: SweepConfig = SweepConfig()
    published: list[PublishedConfig] = Field(
        default_factory=list, description="figures of a paper, shown beside the run's own"
    )
    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _latents_are_there(self) -> RunConfig:
        largest = max(self.cam.numbers, default=-1)
        if largest >= self.usae.n_latents:
            raise ValueError(
                f"cam.latents names latent {largest}, but usae.n_latents = {self.usae.n_latents}: latents are numbered "
                f"0 to {self.usae.n_latents - 1}"
            )
        return self

    @model_validator(mode="after")
    def _sparsity_uses(self) -> RunConfig:
        check_used(self.train.changed, self.usae.sparsity)
        return self

    @model_validator(mode="after")
    def _controls_have_rows(self) -> RunConfig:
        if self.probes.controls and self.buffer.mode == "ring":
            raise ValueError(
                "probes.controls trains again from rows that buffer.mode = 'ring' drops: set mode = 'store', "
                "with online = true if training is to go along with the harvest"
            )
        return self

    @model_validator(mode="after")
    def _published_settings(self) -> RunConfig:
        asked = {key for each in self.published for key in each.settings}
        if asked:
            known = [f"{t}.{key}" for t, _, keys in _tables() for key in keys if t not in ("models", "published")]
            for key in sorted(asked.difference(known)):
                raise ValueError(
                    f"published.settings names '{key}', which is no key; {nearest(key, known)}".rstrip("; ")
                )
        return self

    @property
    def base(self) -> Path:
        """The folder that relative paths start from: the config file's own."""
        return self._base

    def checkpoint_path(self, model: str) -> Path | None:
        """Return where a model's local weights are; None where it has none."""
        given = self.models[model].checkpoint
        return self.base / Path(given).expanduser() if given is not None else None

    def published_here(self) -> list[PublishedConfig]:
        """Return the published figures whose settings are this config's own."""
        return [each for each in self.published if all(self._value(key) == v for key, v in each.settings.items())]

    def _value(self, key: str) -> Any:
        table, _, name = key.partition(".")
        return getattr(getattr(self, table), name)

    def on(self, device: str | None = None, dtype: str | None = None, *, strict: bool = False) -> RunConfig:
        """Return the config with all models and the training on one device, all forward passes in one dtype.

        With `strict` an image that cannot be decoded is an error; else what the config says of it holds.

        Raises:
            ConfigError: for a device or a dtype that there is not.
        """
        of_models = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        models = {name: settled((model,), of_models)[0] for name, model in self.models.items()}
        (train,) = settled((self.train,), {} if device is None else {"device": device})
        (images,) = settled((self.images,), {"strict": True} if strict else {})
        return self.model_copy(update={"models": models, "train": train, "images": images})

    @property
    def lists_layers(self) -> str:
        """What lists the models' layers, for error messages; empty for a config that was read from no file."""
        return f"`usae-probe layers {self._file}` lists them" if self._file else ""

    def sites_of(self, model: str) -> list[Site]:
        """Parse the `layers` of one model (globs are still unexpanded)."""
        return [Site.of(model, layer) for layer in self.models[model].layers]

    @property
    def image_path(self) -> str:
        """`images.source` with a relative path resolved; names of data sets stay as they are."""
        prefix, colon, name = self.images.source.partition(":")
        if not colon or prefix not in ("torchvision", "datasets"):
            return str(self._resolved(self.images.source))
        local = self._resolved(name)
        return f"{prefix}:{local}" if prefix == "datasets" and local.exists() else self.images.source

    @property
    def image_options(self) -> dict[str, Any]:
        """`images.options` with relative folders resolved."""
        folders = ("root", "data_dir", "cache_dir")
        return {
            key: str(self._resolved(value)) if key in folders and isinstance(value, str) else value
            for key, value in self.images.options.items()
        }

    def _resolved(self, path: str) -> Path:
        return (self.base / Path(path).expanduser()).resolve()

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read and check a TOML file; `${NAME}` and `${NAME:-default}` stand for environment variables.

        Raises:
            ConfigError: when the file is missing, is no TOML, or does not follow the schema.
        """
        path = Path(path)
        if path.is_dir():
            of_run = "the config that its run was made with; report, cam and export take the run folder"
            hint = of_run if (path / "run.json").is_file() else "the path of a TOML file"
            raise ConfigError(f"'{path}' is a folder, a config was expected", hint=f"give {hint}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read config '{path}': {error}", hint="give the path of a TOML file") from error
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"'{path}' is not valid TOML: {error}") from error
        return cls.from_dict(data, base=path.resolve().parent, file=path)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, base: Path, file: Path | None = None) -> RunConfig:
        """Check a parsed config; `base` is the folder of relative paths, `file` what it was read from.

        Raises:
            ConfigError: naming key, value and what was expected.
        """
        config = checked(cls, _expanded(dict(data)))
        config._base, config._file = base, file
        for name in config.models:
            check_model_name(name)
            config.sites_of(name)  # parsed once here, so that a mistake is named before any model is built
        return config


def default_of(key: str) -> Any:
    """Return the default of a config key spelled `table.key` or `models.NAME.key`; None where it has none."""
    table, _, rest = key.partition(".")
    name, _, last = rest.rpartition(".")
    field = field_at(RunConfig, (table, name, last) if name else (table, last))
    return None if field is None or field.is_required() else field.get_default(call_default_factory=True)


def documented_keys() -> Iterator[tuple[str, str, str, str]]:
    """Yield (table, key, default, description) of every config key: the README's table is made from it."""
    for _, name, keys in _tables():
        for key, entry in keys.items():
            default = "required" if entry.is_required() else _shown(entry.get_default(call_default_factory=True))
            yield name, key, default, entry.description or ""


def _tables() -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
    """Yield of every table its key in the config, how it is spelled, and its keys."""
    inner: dict[str, tuple[str, type[BaseModel]]] = {
        "models": ("models.NAME", ModelConfig),
        "published": ("published", PublishedConfig),
    }
    for table, field in RunConfig.model_fields.items():
        name, model = inner.get(table, (table, field.annotation))
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield table, name, model.model_fields


def _shown(default: Any) -> str:
    return default.human_readable() if isinstance(default, ByteSize) else repr(default)


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(_variable, value)
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return value


def _variable(match: re.Match[str]) -> str:
    given = os.environ.get(match["name"]) or match["default"]
    if given is None:
        raise ConfigError(
            f"the config uses ${{{match['name']}}}, which is not set",
            hint=f"export {match['name']}=…, or write ${{{match['name']}:-default}}",
        )
    return given
