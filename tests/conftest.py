"""Set-up of every test: beartype first (nnsight mounts `.save` on `object`, which breaks a later import of it)."""

import beartype  # noqa: F401, I001

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_ALONE = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(2 if _ALONE else 1)  # workers side by side: threads of both would wait for each other
if not _ALONE:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background, as CI may do: Ctrl-C is tested here
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_folder() -> Path:
    """The real images and models: `$USAE_PROBE_SHARED`, or `../shared` beside the project."""
    given = os.environ.get("USAE_PROBE_SHARED")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not (folder / "data").is_dir():
        pytest.skip(f"no real images and models in {folder} (set USAE_PROBE_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: on tiny products threads only wait for each other, and bits can depend on their number."""
    from usae_probe.world import one_thread  # not at the top: pytest's type checks are not on yet there

    with one_thread():
        yield
