"""Adapter `transformer-lens`: Hugging Face ViT and DeiT under TransformerLens's hook names, by name or live.

Both libraries take seconds to import, so they are imported by `load` alone, and never to look at a live model.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usae_probe.adapter import LoadedModel, ModelSpec, Preprocessing
from usae_probe.errors import AdapterError, CheckpointError, UsageError, first_line, nearest
from usae_probe.hooks import Layout, Point

from .weights import joined, listed, read_state_dict

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FIXED = ("model_type", "return_dict", "transformers_version", "dtype")
_BRIDGES = "transformer_lens.model_bridge.transformer_bridge"


class TransformerLensAdapter:
    """Boot a `TransformerBridge` on a Hugging Face ViT or DeiT, and recognise live ones.

    Layers go by TransformerLens's names (`blocks.5.hook_resid_post`, `blocks.5.attn.hook_z`), aliases too.

    `options` are fields of the Hugging Face configuration, such as `num_labels` or, with `pretrained = false`,
    `num_hidden_layers`. `architectures = ["DeiTModel"]` loads a body without its heads. A bridge that is set up in
    any other way (folded norms, say) is booted from Python and given to `attach` live.
    """

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Boot the model that a hub name or a local folder (relative to `spec.base`) names.

        `checkpoint` may spell its weights as the Hugging Face module does, or as files on the hub do.

        Raises:
            UsageError: for a folder that does not exist, an option the configuration does not have, or an
                architecture that TransformerLens does not support.
            AdapterError: when configuration or weights cannot be loaded, offline for instance.
            CheckpointError: when weights do not fit.
        """
        _import_libraries()
        with _quiet():
            source = _source(spec)
            config = _configured(source, spec)
            hf_model = _built(_model_class(config, spec), config, source, spec)
            bridge = _bridged(hf_model.eval(), source, spec)
        return _described(bridge)

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Recognise live bridges that take pictures."""
        library = sys.modules.get(_BRIDGES)  # nobody has a bridge who has not imported it
        if library is None or not isinstance(module, library.TransformerBridge):
            return None
        return _described(module) if getattr(module.cfg, "is_visual_model", False) else None


def _described(bridge: nn.Module) -> LoadedModel:
    known = _preprocessing(getattr(bridge, "processor", None), _pair(_config_of(bridge).image_size))
    return LoadedModel(bridge, known, bridge_layouts, bridge_points(bridge))


def _preprocessing(processor: Any, image_size: tuple[int, int]) -> Preprocessing | None:
    """Say in our terms what a Hugging Face image processor does; None where it has no picture of one size.

    Args:
        processor: the processor, or None.
        image_size: height and width the model takes; where the processor makes another size, the model's counts.
    """
    if processor is None:
        return None
    told = processor.to_dict()
    scaled = _sides(told.get("size"))
    kept = _sides(told.get("crop_size")) if told.get("do_center_crop") else scaled
    by_edge = "shortest_edge" in (told.get("size") or {})
    if not told.get("do_resize") or scaled is None or kept is None or (by_edge and not told.get("do_center_crop")):
        return None
    if kept[0] * scaled[1] != kept[1] * scaled[0] or kept[0] > scaled[0]:
        return None  # a crop of another shape than the scaled picture, or with borders
    share = kept[0] / scaled[0]
    if math.floor(kept[0] / share) < scaled[0]:
        share = math.nextafter(share, 0.0)  # so that rounding leaves the canvas the size it says
    # It computes (factor * level - mean) / std for levels in 0..255, we (level / 255 - mean) / std.
    unit = 255 * told.get("rescale_factor", 1 / 255) if told.get("do_rescale") else 255.0
    mean, std = (told["image_mean"], told["image_std"]) if told.get("do_normalize") else ([0.0] * 3, [1.0] * 3)
    return Preprocessing(
        image_size=image_size,
        mean=tuple(round(value / unit, 9) for value in mean),
        std=tuple(round(value / unit, 9) for value in std),
        interpolation={0: "nearest", 2: "bilinear"}.get(int(told.get("resample", 3)), "bicubic"),
        crop_pct=share,
        crop_mode="center" if by_edge else "squash",
    )


def _sides(size: Mapping[str, Any] | None) -> tuple[int, int] | None:
    size = size or {}
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    return None if height is None or width is None else (int(height), int(width))


def bridge_points(bridge: Any) -> dict[str, Point]:
    """Give every hook name of a bridge its place; several names may share one, and some never run.

    What `Point.convert` makes of the hook point's output is what `run_with_cache` stores under the name.
    """
    return {name: _point(hook_point) for name, hook_point in bridge.hook_dict.items()}


def _point(hook_point: Any) -> Point:
    conversion = hook_point.hook_conversion
    # AttentionAutoConversion puts the four axes of attention patterns in order. Where vision models have it the
    # output has three and stays as it is, but the conversion would note the id of every tensor it sees, for ever.
    if conversion is None or type(conversion).__name__ == "AttentionAutoConversion":
        return Point(hook_point)
    return Point(hook_point, conversion.convert, conversion.revert)


def bridge_layouts(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout | None]:
    """Say what the activations at a bridge's points mean; `shapes` are those after `Point.convert`, without the batch.

    The residual stream is [T,D] and heads are [T,heads,d_head], with the class token, and DeiT's distillation token,
    in front. Attention patterns [heads,T,T] have no layout. The grid is the configuration's, where T fits it.
    """
    bridge: Any = module
    config, embeddings = _config_of(bridge), bridge.embed.original_component
    has_cls = hasattr(embeddings, "cls_token")
    prefix = int(has_cls) + int(hasattr(embeddings, "distillation_token"))
    (height, width), (down, across) = _pair(config.image_size), _pair(config.patch_size)
    grid = (height // down, width // across)
    known = bridge.hook_dict.keys()
    layouts: dict[str, Layout | None] = {}
    for name, shape in shapes.items():
        if name not in known:
            continue
        if name.endswith((".hook_pattern", ".hook_attn_scores")):
            layouts[name] = None
        elif name == "embed.hook_in":
            layouts[name] = Layout("nchw", prefix=0, grid=(shape[1], shape[2]))
        elif len(shape) == 1:
            layouts[name] = Layout("vector")
        elif len(shape) in (2, 3):
            fits = shape[0] == prefix + grid[0] * grid[1]
            heads = "last" if len(shape) == 3 else None
            layouts[name] = Layout("tokens", prefix, has_cls, grid if fits else None, heads)  # type: ignore[arg-type]
    return layouts


def _import_libraries() -> None:
    try:
        import transformers  # noqa: F401
        from transformer_lens.model_bridge.sources import transformers as bridges  # noqa: F401
    except Exception as error:
        raise AdapterError(
            f"transformer_lens cannot be imported: {type(error).__name__}: {first_line(error)}",
            hint="install transformer-lens and a release of transformers that it works with",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what both libraries tell the terminal off it, stdout above all: a command's JSON may go there."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _source(spec: ModelSpec) -> str:
    """A folder's full path, or a name on the hub."""
    folder = spec.base / Path(spec.name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if not _HUB_NAME.fullmatch(spec.name):
        raise UsageError(f"folder '{folder}' does not exist", hint="a path in a config is relative to the config file")
    return spec.name


def _configured(source: str, spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _unloadable("configuration", spec, error) from error
    fields = ["num_labels", *(key for key in config.to_dict() if not key.startswith("_") and key not in _FIXED)]
    for key, value in spec.options.items():
        if key not in fields:
            raise UsageError(f"the configuration of '{spec.name}' has no option '{key}'", hint=nearest(key, fields))
        try:
            setattr(config, key, value)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"'{spec.name}' does not take {key} = {value!r}: {reason}") from error
    return config


def _model_class(config: Any, spec: ModelSpec) -> Any:
    import transformers
    from transformer_lens.utilities.architectures import VISION_ARCHITECTURES

    classes = {
        name: getattr(transformers, name) for name in sorted(VISION_ARCHITECTURES) if hasattr(transformers, name)
    }
    fitting = [name for name, kind in classes.items() if isinstance(config, kind.config_class)]
    named = (config.architectures or [name for name in fitting if name.endswith("ForImageClassification")] or [None])[0]
    if named in fitting:
        config.architectures = [named]
        return classes[named]
    hint = f"it supports {', '.join(classes)}"
    if fitting:
        hint += f"; options = {{ architectures = ['{fitting[-1]}'] }} loads '{spec.name}' without its heads"
    raise UsageError(f"'{spec.name}' is a {named or config.model_type}, which TransformerLens cannot bridge", hint=hint)


def _built(kind: Any, config: Any, source: str, spec: ModelSpec) -> Any:
    if spec.checkpoint is not None:
        return _with_weights(kind, config, spec, state=read_state_dict(spec.checkpoint))
    if spec.pretrained:
        return _with_weights(kind, config, spec, source=source)
    try:
        return kind(config)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"'{spec.name}' cannot be built with options {dict(spec.options)}: {reason}") from error


def _with_weights(
    kind: Any, config: Any, spec: ModelSpec, *, source: str | None = None, state: dict[str, Tensor] | None = None
) -> Any:
    """Load weights through Hugging Face, which knows how names on the hub become names of the module; then be strict.

    Bodies are often saved without a pooler: such a one is built without it.
    """
    settings: dict[str, Any] = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    settings |= {} if state is None else {"state_dict": state}
    try:
        model, told = kind.from_pretrained(source, **settings)
        if told["missing_keys"] and all(key.startswith("pooler.") for key in told["missing_keys"]):
            model, told = kind.from_pretrained(source, **settings, add_pooling_layer=False)
    except Exception as error:
        if state is not None:
            raise CheckpointError(
                f"checkpoint '{spec.checkpoint}' does not fit model '{spec.name}': {first_line(error)}"
            ) from error
        raise _unloadable("weights", spec, error) from error
    _check_loaded(told, spec, of_a_file=state is not None)
    return model


def _check_loaded(told: Mapping[str, Any], spec: ModelSpec, *, of_a_file: bool) -> None:
    """Refuse weights that Hugging Face would leave random; what a hub's file holds beyond the model is no harm."""
    problems = [
        f"{key} is {list(given)} in the weights, {list(wanted)} in the model"
        for key, given, wanted in sorted(told["mismatched_keys"])
    ]
    problems += listed("missing", sorted(set(told["missing_keys"]) - {entry[0] for entry in told["mismatched_keys"]}))
    problems += listed("not in the model", sorted(told["unexpected_keys"]) if of_a_file else [])
    if problems:
        where = f"checkpoint '{spec.checkpoint}' does" if of_a_file else "the pretrained weights do"
        raise CheckpointError(
            f"{where} not fit model '{spec.name}': {joined(problems)}",
            hint="check the model's name and options (num_labels, image_size)",
        )


def _bridged(hf_model: Any, source: str, spec: ModelSpec) -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(
            source, hf_model=hf_model, model_class=type(hf_model), device="cpu"
        )
    except Exception as error:
        raise AdapterError(
            f"TransformerLens cannot bridge '{spec.name}': {type(error).__name__}: {first_line(error)}"
        ) from error
    for name, hook_point in bridge.hook_dict.items():
        if name.endswith((".hook_normalized", ".hook_scale")):
            # A norm's bridge computes these two without gradients unless it sees a hook of its own library on them.
            hook_point.add_perma_hook(_only_look)
    bridge.__dict__["to"] = partial(bridge.to, print_details=False)  # or it prints on stdout where it goes
    module: nn.Module = bridge
    return module


def _only_look(tensor: Any, *, hook: Any) -> None:
    """Change nothing."""


def _unloadable(what: str, spec: ModelSpec, error: Exception) -> AdapterError:
    return AdapterError(
        f"the {what} of '{spec.name}' could not be loaded: {type(error).__name__}: {first_line(error)}",
        hint="give a name on the Hugging Face hub, or, without network, a local folder as save_pretrained writes it",
    )


def _config_of(bridge: Any) -> Any:
    return bridge.original_model.config


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
