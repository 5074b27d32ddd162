"""Whatever is given by mistake or in a hurry: one clear message, the right exit status, never a traceback."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usae_probe import RunConfig
from usae_probe.cli import app
from usae_probe.config import documented_keys
from usae_probe.errors import UsageError

from .command import Command, command
from .tiny_run import CONFIG, put_tiny_run, toml


def _collect(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, entry in group.commands.items():
        if hasattr(entry, "commands"):
            yield from _collect(entry, (*prefix, name))
        else:
            yield (*prefix, name), entry


COMMANDS = {" ".join(path): entry for path, entry in _collect(typer.main.get_command(app))}
STARTS = {"demo", "adapters", "doctor"}
"""What works without any argument (and is long, or always well)."""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    put_tiny_run(tmp_path)
    (tmp_path / "c.toml").write_text(toml(CONFIG))
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def refused(cli: Command, *arguments: str, n_path: int = 1) -> None:
    """The command, of `n_path` words, is refused with one clear message, in both forms."""
    plain = cli(*arguments)
    assert plain.status in (1, 2), arguments
    assert "Traceback" not in plain.err + plain.out, arguments
    assert "this is a bug" not in plain.err, (arguments, plain.err)
    as_json = cli(*arguments[:n_path], "--json", *arguments[n_path:])
    assert as_json.status == plain.status, arguments
    assert set(as_json.document["error"]) == {"type", "message", "hint"}, arguments
    assert as_json.document["error"]["message"], arguments


def test_all_commands_are_seen() -> None:
    assert {"run", "harvest", "train", "evaluate", "sweep", "scan", "demo", "cam", "report", "export"} <= set(COMMANDS)
    assert {"adapters", "layers", "doctor", "buffer info", "buffer verify", "buffer export"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_flags(cli: Command, name: str) -> None:
    entry, path = COMMANDS[name], name.split()
    n = len(path)
    given = [p for p in entry.params if p.param_type_name == "argument"]
    arguments = ["c.toml" if "CONFIG" in (p.metavar or "") else "nowhere" for p in given]
    if name not in STARTS:
        refused(cli, *path, n_path=n)
    refused(cli, *path, *arguments, "--no-such-option", n_path=n)
    refused(cli, *path, *arguments, "one", "too", "many", n_path=n)
    for option in entry.params:
        if option.param_type_name != "option" or option.is_flag or option.name == "help":
            continue
        flag = option.opts[0]
        refused(cli, *path, *arguments, flag, n_path=n)  # its value is missing
        if option.bare_type in (int, float):
            below = [str(option.min - 1)] if option.min is not None else []
            for value in ("many", "1.5e", "", *below):
                refused(cli, *path, *arguments, flag, value, n_path=n)
    assert all(hasattr(option, "bare_type") for option in entry.params)


def test_no_such_command(cli: Command) -> None:
    for arguments in (["rnu"], ["buffer", "inf"], ["--jsn"], ["run", "--debug"]):
        refused(cli, *arguments)
    assert list(Path.cwd().glob("runs")) == []


# --- configs ---

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(
        ["auto", "cpu", "topk", "all", "random", "a/2", "a/2@patch", "../x", "~", "${NO_SUCH}", "é\x00", "10m"]
    ),
    st.lists(st.integers(-2, 40), max_size=3),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
KEYS = [(table, key) for table, key, *_ in documented_keys()]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3), junk=st.booleans())
def test_any_value_of_any_key_is_taken_or_refused_by_name(
    changes: list[tuple[tuple[str, str], Any]], junk: bool
) -> None:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for (table, key), value in changes:
        if table == "published":
            config["published"] = [{"source": "x", key: value}]
        else:
            where = config["models"]["a"] if table == "models.NAME" else config.setdefault(table, {})
            where[key] = value
    if junk:
        config["tarin"] = {}
    try:
        made = RunConfig.from_dict(config, base=Path("."))
    except UsageError:
        pass
    else:
        assert not junk
        assert RunConfig.from_dict(json.loads(made.model_dump_json()), base=Path(".")) == made


@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))))
def test_any_bytes_as_a_config_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        RunConfig.load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_mistyped_config_file(tmp_path: Path, data: st.DataObject) -> None:
    text = toml(CONFIG)
    at, letter = data.draw(st.integers(0, len(text) - 1)), data.draw(st.sampled_from('"=[]{}.#\n\x00é7a'))
    changed = data.draw(
        st.sampled_from([text[:at], text[:at] + letter + text[at + 1 :], text[:at] + letter + text[at:]])
    )
    (tmp_path / "c.toml").write_text(changed, encoding="utf-8")
    try:
        RunConfig.load(tmp_path / "c.toml")
    except UsageError:
        pass
    else:
        tomllib.loads(changed)
