"""What a sweep goes through: values of config keys, read as TOML, and the configs of all their combinations."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import BaseModel

from ..config import ProbesConfig, RunConfig, TrainConfig, UsaeConfig, checked
from ..errors import ConfigError, UsageError, nearest

_TABLES: dict[str, type[BaseModel]] = {"usae": UsaeConfig, "train": TrainConfig, "probes": ProbesConfig}
_ONE_BUFFER = ("models", "images", "buffer")
_INSTEAD = {"train.epochs": "steps", "train.steps": "epochs"}  # two spellings of one thing
_LONGEST = 80


@dataclass(frozen=True)
class Combination:
    """One cell of a sweep: values of the keys that are set, and a seed.

    Attributes:
        settings: value by dotted key, as the config understands it.
        seed: of the training.
        config: the whole config with them.
    """

    settings: dict[str, Any]
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """How people read it: `n_latents=2042 k=32 seed 0`."""
        return f"{spelled_settings(self.settings)} seed {self.seed}".strip()

    @property
    def folder(self) -> str:
        """How its folder is called: `usae.n_latents=2042__usae.k=32__seed=0`."""
        parts = [f"{key}={spelled(value)}" for key, value in self.settings.items()]
        name = "__".join(parts)
        safe = re.sub(r"[^\w.+=-]", "_", name)
        if safe != name or len(safe) > _LONGEST:
            safe = f"{safe[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"{safe}__seed={self.seed}".removeprefix("__")


def parsed_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `table.key=value,value,…`; values are TOML, and what is none is a string.

    >>> parsed_settings(["usae.k=32,64", "train.source=random,all", "train.lr=1e-3"])
    {'usae.k': [32, 64], 'train.source': ['random', 'all'], 'train.lr': [0.001]}

    Raises:
        ConfigError: naming the text that cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ConfigError(f"'{text}' is not key=value,value,…", hint="e.g. --set usae.n_latents=2042,8168")
        found.setdefault(key.strip(), []).extend(_value(part, text) for part in _parts(values))
    return found


def combinations(config: RunConfig, settings: Mapping[str, Sequence[Any]], seeds: int) -> list[Combination]:
    """Return every combination of the settings with every seed, once each, checked; seeds vary fastest.

    Args:
        config: what all combinations have in common; its `train.seed` is the first seed.
        settings: values by dotted key of [usae], [train] or [probes].
        seeds: how many.

    Raises:
        ConfigError: for an unknown key, a value that its key refuses, or values that do not go together, naming the
            combination.
        UsageError: for a key that a sweep cannot set, no value, or no seed.
    """
    if seeds < 1:
        raise UsageError(f"{seeds} seeds were asked for, a sweep needs at least 1")
    for key, values in settings.items():
        _check_key(key)
        if not values:
            raise UsageError(f"no value is given for '{key}'", hint=f"e.g. --set {key}=1,2")
    found: dict[str, Combination] = {}
    for values in product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        for at in range(seeds):
            made = _combination(config, chosen, config.train.seed + at)
            found.setdefault(json.dumps([made.settings, made.seed], sort_keys=True), made)
    return list(found.values())


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return how keys are shown: without the table where that is clear.

    >>> short_keys(["usae.k", "train.seed", "probes.seed"])
    {'usae.k': 'k', 'train.seed': 'train.seed', 'probes.seed': 'probes.seed'}
    """
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def spelled(value: Any) -> str:
    """Spell a value as in TOML, strings bare."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def spelled_settings(settings: Mapping[str, Any]) -> str:
    """Spell settings for people: `n_latents=2042 k=32`."""
    names = short_keys(list(settings))
    return " ".join(f"{names[key]}={spelled(value)}" for key, value in settings.items())


def _combination(config: RunConfig, chosen: Mapping[str, Any], seed: int) -> Combination:
    # Only what the config says itself: a key that decides the defaults of others can be swept, too.
    whole = config.model_dump(exclude_unset=True, exclude={"cam"})
    tables: dict[str, dict[str, Any]] = {name: dict(whole.get(name, {})) for name in _TABLES}
    for key, value in chosen.items():
        table, _, name = key.partition(".")
        other = _INSTEAD.get(key)
        if other and f"{table}.{other}" not in chosen:
            tables[table].pop(other, None)
        tables[table][name] = value
    tables["train"]["seed"] = seed
    try:
        made = checked(RunConfig, whole | tables)
    except ConfigError as error:
        raise ConfigError(f"combination {spelled_settings(chosen)}: {error.message}", hint=error.hint) from error
    understood = made.model_dump(mode="json")
    settings = {key: understood[key.partition(".")[0]][key.partition(".")[2]] for key in chosen}
    changed = config.model_copy(update={name: getattr(made, name) for name in _TABLES})
    return Combination(settings, seed, changed)


def _check_key(key: str) -> None:
    table, _, name = key.partition(".")
    if table in _ONE_BUFFER:
        raise UsageError(
            f"'{key}' cannot be set in a sweep: all of its trainings share one buffer of activations",
            hint="make a config of it and sweep that; what can be set is in [usae], [train] and [probes]",
        )
    if key == "train.seed":
        raise UsageError("'train.seed' cannot be set in a sweep", hint="ask for several seeds: --seeds 3")
    known = [f"{table}.{name}" for table, model in _TABLES.items() for name in model.model_fields]
    if key in known:
        return
    of_that_name = [other for other in known if other.endswith(f".{name or table}")]
    hint = f"did you mean '{of_that_name[0]}'?" if of_that_name else nearest(key, known)
    raise ConfigError(f"unknown config key '{key}'", hint=hint or "keys of [usae], [train] and [probes] can be set")


def _parts(text: str) -> Iterator[str]:
    """Split at the commas that are in no brackets and no quotes."""
    depth, quote, part = 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if letter == "," and not quote and not depth:
            yield part
            part = ""
        else:
            part += letter
    yield part


def _value(part: str, text: str) -> Any:
    bare = part.strip()
    if not bare:
        raise ConfigError(f"'{text}' has an empty value", hint='an empty string is written ""')
    try:
        return tomllib.loads(f"value = {bare}")["value"]
    except tomllib.TOMLDecodeError as error:
        if bare[0] in "[{\"'":
            raise ConfigError(f"'{bare}' in '{text}' is not valid TOML: {error}") from error
        return bare
