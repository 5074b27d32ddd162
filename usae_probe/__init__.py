"""usae-probe: what do trained vision models represent in common?

Hooks stream the activations of any layers of live models into HDF5 buffers; a Universal Sparse Autoencoder trains from
them; probes measure what the models share.

| to | there is |
| --- | --- |
| hook a model | `attach`, which gives a `HookedModel`; `Site`, `Preprocessing` |
| keep activations | `harvest`, which gives an `ActivationBuffer`; `harvest_and_train`: more rows than fit the disk |
| train | `train`, `train_independent`, which give a `USAE` in a `TrainResult`; `Codes` are what it encodes to |
| train elsewhere, follow it | `joined` for several processes, `TensorBoardCallback` |
| measure | `evaluate`, which gives a `UniversalityReport`; `scan` of whole networks, which gives a `ScanReport` |
| see | `maximize`, which gives `CamPicture`s |
| have all of it in one folder, with resume | `Run` and `Sweep` of a `RunConfig` |
| share | `export_sae` |
| see how far it is | `bars`, for everything that takes `progress=` |

Errors that the user can mend are `UsaeProbeError`s. Adapters for other kinds of models keep to `usae_probe.adapter`.

Example:
    ```python
    import usae_probe as up

    resnet = up.attach("timm:resnet18.a1_in1k", layers=["layer4"])
    vit = up.attach("timm:vit_base_patch16_224.augreg_in21k_ft_in1k", layers=["blocks.11"])
    buffer = up.harvest([resnet, vit], "photos/", out="acts")
    run = up.train(buffer, n_latents=2042, k=64)
    report = up.evaluate(run.usae, buffer)
    print(report.r2["resnet18/layer4"]["vit_base_patch16_224/blocks.11"], report.counts)
    ```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attaching import attach
    from .buffer import ActivationBuffer
    from .config import RunConfig
    from .errors import UsaeProbeError
    from .harvesting import harvest
    from .hooks import HookedModel
    from .images import Preprocessing
    from .online import harvest_and_train
    from .pipeline import Run, Sweep
    from .probes import UniversalityReport, evaluate
    from .probes.cam import CamPicture, maximize
    from .probes.scan import ScanReport, scan
    from .report.bars import bars
    from .sites import Site
    from .usae import USAE, Codes, TensorBoardCallback, TrainResult, export_sae, train, train_independent
    from .usae.distributed import joined

__version__ = "0.1.0"

# Names are loaded when first used, so that importing the package is quick.
_HOMES = {
    "ActivationBuffer": "buffer",
    "CamPicture": "probes.cam",
    "Codes": "usae",
    "HookedModel": "hooks",
    "Preprocessing": "images",
    "Run": "pipeline",
    "RunConfig": "config",
    "ScanReport": "probes.scan",
    "Site": "sites",
    "Sweep": "pipeline",
    "TensorBoardCallback": "usae",
    "TrainResult": "usae",
    "USAE": "usae",
    "UniversalityReport": "probes",
    "UsaeProbeError": "errors",
    "attach": "attaching",
    "bars": "report.bars",
    "evaluate": "probes",
    "export_sae": "usae",
    "harvest": "harvesting",
    "harvest_and_train": "online",
    "joined": "usae.distributed",
    "maximize": "probes.cam",
    "scan": "probes.scan",
    "train": "usae",
    "train_independent": "usae",
}

__all__ = [
    "USAE",
    "ActivationBuffer",
    "CamPicture",
    "Codes",
    "HookedModel",
    "Preprocessing",
    "Run",
    "RunConfig",
    "ScanReport",
    "Site",
    "Sweep",
    "TensorBoardCallback",
    "TrainResult",
    "UniversalityReport",
    "UsaeProbeError",
    "attach",
    "bars",
    "evaluate",
    "export_sae",
    "harvest",
    "harvest_and_train",
    "joined",
    "maximize",
    "scan",
    "train",
    "train_independent",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'usae_probe' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
