"""The reference pages: `make reference` builds them from the docstrings, and every public name is on them."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import usae_probe

ROOT = Path(__file__).resolve().parents[1]


def build_command(out: Path) -> list[str]:
    """The command that `make reference` runs, with this interpreter."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    asked = ["make", "--dry-run", "reference", f"REFERENCE={out}", "VENV=nowhere"]
    lines = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (line,) = [line for line in lines if "bin/pdoc " in line]
    return [sys.executable, "-m", *shlex.split(line.replace("nowhere/bin/", ""))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference")
    command = [*build_command(out), "--no-show-source"]  # highlighting all of it takes as long again
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("Warn")]
    # pdoc's own: of a dataclass that is shown where it is imported, names that are there for type checkers only
    assert not [line for line in said if "Error parsing type annotation ForwardRef" not in line]
    return {
        ".".join(file.relative_to(out).with_suffix("").parts): file.read_text(encoding="utf-8")
        for file in out.rglob("*.html")
    }


def test_every_public_name_has_its_place_and_text(pages: dict[str, str]) -> None:
    asked = [module for module in build_command(Path("out")) if module.startswith(("usae_probe", "usae_adapters"))]
    assert set(asked) <= set(pages)
    for module in asked:
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", ()):
            _, found, section = pages[module].partition(f'<section id="{name}">')
            assert found, f"{module}.{name} is not on its page"
            member = getattr(loaded, name)
            if getattr(member, "__module__", "").startswith("usae_") and callable(member):
                words = re.findall(r"\w+", (inspect.getdoc(member) or "").split("\n")[0])[:3]
                assert words, f"{module}.{name} has no docstring"
                text = html.unescape(re.sub(r"<[^>]+>", "", section.partition('class="docstring">')[2][:600]))
                assert all(word in text for word in words), f"{module}.{name}: {words}, the page says {text}"


def test_the_front_page_names_every_public_name_of_the_package() -> None:
    assert usae_probe.__doc__
    for name in usae_probe.__all__:
        assert re.search(rf"`{name}`", usae_probe.__doc__), f"{name} is missing from the package's docstring"
