"""The frame: what the wheel holds, what importing costs, which names stay free."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import usae_probe
from usae_probe.config import documented_keys

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "usae_probe").rglob("*.py")) + sorted((ROOT / "adapters").rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"usae_probe", "usae_adapters"}
    expected = {str(path.relative_to(ROOT)).removeprefix("adapters/") for path in SOURCES}
    expected |= {"usae_probe/py.typed", "usae_adapters/py.typed", "usae_probe/demo/demo.toml"}
    expected |= {f"usae_probe/demo/{name}" for name in ("networks.json", "resnet.safetensors", "vit.safetensors")}
    expected |= {f"usae_probe/report/explorer/{name}" for name in ("page.html.j2", "explorer.css", "explorer.js")}
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    assert sum(entry.file_size for entry in wheel.infolist()) < 5e6


def test_the_demo_of_the_wheel_attaches_and_draws_from_nothing_else(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked elsewhere, first on the path, in a process of its own: weights, drawings and adapters are its own."""
    wheel.extractall(tmp_path / "site")
    code = (
        "from pathlib import Path\n"
        "import usae_probe, usae_adapters, usae_probe as up, usae_probe.demo as demo\n"
        "assert all(str(Path('site').resolve()) in m.__file__ for m in (usae_probe, usae_adapters))\n"
        "demo.N_IMAGES = 4\n"
        "config = demo.prepare_demo(Path('d'))\n"
        "for name, entry in config.models.items():\n"
        "    given = entry.model_dump(exclude={'adapter', 'name', 'layers'})\n"
        "    given |= {'adapter': 'timm', 'name': name, 'layers': entry.layers, 'base': config.base}\n"
        "    with up.attach(entry.name, **given) as m:\n"
        "        assert len(m.sites) == 2\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_declares_entry_points_and_dependencies_with_floors_alone(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(entry_points).decode()
    assert "usae-probe = usae_probe.cli:main" in text
    assert "timm = usae_adapters.timm_models:TimmAdapter" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (about,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", wheel.read(about).decode(), re.MULTILINE)
    assert len(required) == len(project["dependencies"])
    for requirement in required:  # a pin or a ceiling would keep the package out of other people's environments
        assert re.fullmatch(r"[a-z0-9-]+>=\d+(\.\d+)+", requirement), requirement
    assert project["version"] == usae_probe.__version__


def test_an_installed_adapterhub_stays_importable() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_importing_the_package_and_asking_for_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, usae_probe, usae_probe.cli\n"
        "sys.argv = ['usae-probe', '--help']\n"
        "try: usae_probe.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nnsight', 'timm', 'matplotlib', 'scipy', 'h5py', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapters" in done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("ha", {"harvest"}), ("run --wo", set()), ("run --str", {"--strict"}), ("buffer ver", {"verify"})],
)
def test_the_shell_completes_commands_and_options(typed: str, offered: set[str]) -> None:
    """As bash asks for it, after `usae-probe --install-completion`."""
    words = f"usae-probe {typed}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_USAE_PROBE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", "import sys; sys.argv = ['usae-probe']; import usae_probe.cli as c; c.main()"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == offered, done.stderr


def test_every_public_name_is_there_and_of_this_package() -> None:
    for name in usae_probe.__all__:
        assert getattr(usae_probe, name).__module__.startswith("usae_probe."), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = usae_probe.nonsense  # type: ignore[attr-defined]


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    code = "import usae_probe.pipeline, usae_probe as up; assert all(callable(getattr(up, n)) for n in up.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_neither_prints_nor_asserts() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts"
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not is_print, f"{path} prints"


def test_every_config_key_is_documented_and_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for table, key, default, description in documented_keys():
        assert description, f"{table}.{key} has no description"
        assert f"| `{table}.{key}` | {default.replace('|', chr(92) + '|')} | {description} |" in readme
