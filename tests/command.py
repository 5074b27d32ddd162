"""Calling the command line in process: its exit status and what it wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from usae_probe.cli import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return what calls `main()` with arguments as a shell would give them."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["usae-probe", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return Outcome(left.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return call
