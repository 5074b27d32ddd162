"""Every family of timm as a small model, with what its layers give: written down from timm's source, not from our code.

A layer's truth is spelled `channels kind rows x columns`:

    24 nchw 2x3             [b, 24, 2, 3]
    24 nhwc 2x3             [b, 2, 3, 24]
    24 cls+4+tokens 2x3     [b, 1 + 4 + 6, 24]: class token, 4 other prefix tokens, 2 × 3 places in raster order
    24 0+tokens 2x3         no prefix tokens;  4+tokens: 4 prefix tokens, none of them a class token
    24 cls+tokens           prefix tokens alone
    24 tokens               [b, t, 24], where no token is a place
    2*12 heads.0+tokens 2x3 [b, 2, 6, 12]: two heads of attention
    8 0+tokens 4x6 unrolled2  places in Hiera's order, two unrollings deep
    24 vector               [b, 24]
    none                    no tensor, several tensors, or axes that have no such name (windows of all pictures, …)

`layer#1` is an element of an output of several tensors. Sizes are rectangular wherever the family takes that, so that
rows and columns cannot be confused. Each of timm's modules is here but for `LEFT_OUT`; a test holds the table to that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
from timm.models import convmixer, focalnet, gcvit, metaformer, mlp_mixer, mobilenetv5, mvitv2, nest, sequencer, volo
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

_TRUTH = re.compile(
    r"none|(?:(?P<heads>\d+)\*)?(?P<channels>\d+) (?:heads\.)?"
    r"(?P<kind>nchw|nhwc|vector|(?P<cls>cls\+)?(?:(?P<more>\d+)\+)?tokens)"
    r"(?: (?P<rows>\d+)x(?P<columns>\d+))?(?: unrolled(?P<unrolled>\d))?"
)


class Truth(NamedTuple):
    """What a layer gives.

    Attributes:
        kind: `nchw`, `nhwc`, `tokens`, `vector`, or `none`.
        channels: of one head, where there are heads.
        heads: 0 without an axis of heads.
        prefix: tokens before the places; None where no token is a place.
        has_cls: whether the first of them is a class token.
        grid: (rows, columns); None without places.
        order: for places that are not in raster order: the token of each place, row by row.
    """

    kind: str
    channels: int = 0
    heads: int = 0
    prefix: int | None = None
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Truth:
        match = _TRUTH.fullmatch(text)
        if match is None:
            raise ValueError(text)
        if text == "none":
            return cls("none")
        tokens = match["kind"].endswith("tokens")
        stated = tokens and match["kind"] != "tokens"
        grid = (int(match["rows"]), int(match["columns"])) if match["rows"] else None
        return cls(
            "tokens" if tokens else match["kind"],
            int(match["channels"]),
            int(match["heads"] or 0),
            int(match["more"] or 0) + bool(match["cls"]) if stated else 0 if grid else None,
            bool(match["cls"]),
            grid,
            unrolled(*grid, int(match["unrolled"])) if grid and match["unrolled"] else None,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape without the batch; () where it cannot be told."""
        if self.kind == "vector":
            return (self.channels,)
        places = self.grid[0] * self.grid[1] if self.grid else 0
        if self.kind == "tokens":
            tokens = places + (self.prefix or 0)
            return ((self.heads,) if self.heads else ()) + (tokens, self.channels) if self.prefix is not None else ()
        if self.grid is None:
            return ()
        return (self.channels, *self.grid) if self.kind == "nchw" else (*self.grid, self.channels)


def unrolled(rows: int, columns: int, levels: int) -> tuple[int, ...]:
    """Hiera's order: the token of each place, row by row.

    One unrolling puts the four places of every 2 × 2 square into four runs, each of them a half-size raster, which the
    next level unrolls in the same way.

    >>> unrolled(2, 4, 1)
    (0, 2, 1, 3, 4, 6, 5, 7)
    """

    def token(row: int, column: int, places: int, level: int) -> int:
        if level == 0:
            return row * (columns >> levels) + column
        run = 2 * (row % 2) + column % 2
        return run * (places // 4) + token(row // 2, column // 2, places // 4, level - 1)

    return tuple(token(row, column, rows * columns, levels) for row in range(rows) for column in range(columns))


@dataclass(frozen=True)
class Family:
    """One small model.

    Attributes:
        model: timm's name.
        size: (rows, columns) of the pictures.
        layers: `layer: truth | layer: truth`, in no special order; blocks of the first third, the middle, the last.
        options: for the factory.
        factory: what builds it where `timm.create_model` lets these options through no further.
    """

    model: str
    size: tuple[int, int]
    layers: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: Callable[..., nn.Module] = timm.create_model

    def truths(self) -> dict[str, Truth]:
        """What each listed layer gives."""
        pairs = (line.strip().split(": ") for line in self.layers.split("|"))
        return {layer: Truth.parse(truth) for layer, truth in pairs}


def _mvit(model: str, **options: Any) -> nn.Module:
    config = mvitv2.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=8, use_cls_token=model.endswith("cls"))
    return build_model_with_cfg(mvitv2.MultiScaleVit, model, model_cfg=config, **options)


def _mobilenetv5(model: str, **options: Any) -> nn.Module:
    """Its own stages are 294 million parameters: the same kinds of blocks, one of each."""
    stages = [["er_r1_k3_s2_e4_c16"], ["uir_r1_a3_k5_s2_e6_c24"]]
    stages += [["uir_r1_a5_k5_s2_e4_c32", f"mqa_r1_k3_h2_{v}s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"] for v in ("v2_", "")]
    return mobilenetv5._create_mnv5_encoder(model, block_args=decode_arch_def(stages), **options)


CNN = (64, 96)  # 2 × 3 places at a stride of 32
VIT = (32, 48)  # 2 × 3 patches of 16
PATCH14 = (28, 42)  # 2 × 3 patches of 14
DEPTH = {"depth": 3, "embed_dim": 24, "num_heads": 2}
BLOCKS = {"num_blocks": 3, "embed_dim": 24, "img_size": VIT}
LAYERS = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}
STAGES = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2), "window_size": 2, "img_size": CNN}
PYRAMID = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
FORMER = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}
PIT = {"img_size": CNN, "base_dims": (8, 8, 8), "depth": (1, 2, 1), "heads": (2, 2, 2)}
LEVIT = {"img_size": CNN, "embed_dim": (16, 24, 32), "depth": (1, 2, 1), "num_heads": (2, 2, 2), "key_dim": 8}
COAT = {"img_size": CNN, "embed_dims": (16,) * 4, "serial_depths": (1, 1, 1, 1)}
ATTENTION = {  # MetaFormer's mixers and norms that make a CAFormer
    "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
}

FAMILIES = (
    # --- plain transformers: tokens, and what stands before them ---
    Family(
        "vit_tiny_patch16_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 | blocks.0.attn.q_norm: 2*12 heads.cls+tokens 2x3 |"
        "blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3 | norm: 24 cls+tokens 2x3 | head: 1000 vector",
        {"img_size": VIT, **DEPTH, "qk_norm": True},
    ),
    Family(
        "vit_small_patch14_reg4_dinov2",
        PATCH14,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+4+tokens 2x3 | blocks.1: 24 cls+4+tokens 2x3 |"
        "blocks.2: 24 cls+4+tokens 2x3 | norm: 24 cls+4+tokens 2x3",
        {"img_size": PATCH14, **DEPTH},
    ),
    Family(
        "vit_base_patch16_siglip_224",  # no class token: a latent attends to all patches at the end
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 |"
        "blocks.2: 24 0+tokens 2x3 | norm: 24 0+tokens 2x3 | attn_pool: 24 vector",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "vit_base_patch16_clip_224",
        VIT,
        "norm_pre: 24 cls+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 |"
        "blocks.2.mlp.fc1: 96 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "vit_small_patch16_18x2_224",  # two attentions and two MLPs side by side
        VIT,
        "blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "flexivit_small",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 |"
        "blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "aimv2_large_patch14_224",
        PATCH14,
        "blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3 | norm: 24 0+tokens 2x3",
        {"img_size": PATCH14, **DEPTH},
    ),
    Family(
        "deit_tiny_distilled_patch16_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+1+tokens 2x3 | blocks.1: 24 cls+1+tokens 2x3 |"
        "blocks.2: 24 cls+1+tokens 2x3 | norm: 24 cls+1+tokens 2x3 | head_dist: 1000 vector",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "deit3_small_patch16_224",
        VIT,
        "blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "beit_base_patch16_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 |"
        "blocks.2: 24 cls+tokens 2x3 | norm: 24 cls+tokens 2x3 | fc_norm: 24 vector",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "beitv2_base_patch16_224",
        VIT,
        "blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "eva02_tiny_patch14_224",  # RoPE
        PATCH14,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 |"
        "blocks.2: 24 cls+tokens 2x3 | fc_norm: 24 vector",
        {"img_size": PATCH14, **DEPTH},
    ),
    Family(
        "vit_small_patch16_dinov3",
        VIT,
        "patch_embed: 24 nhwc 2x3 | blocks.0: 24 cls+4+tokens 2x3 | blocks.1: 24 cls+4+tokens 2x3 |"
        "blocks.2: 24 cls+4+tokens 2x3 | norm: 24 cls+4+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "vit_pe_core_tiny_patch16_384",
        VIT,
        "blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3 |attn_pool: 24 vector",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "naflexvit_base_patch16_gap",  # registers without a class token; patches by a linear map of pixels
        VIT,
        "embeds: 24 4+tokens 2x3 | blocks.0: 24 4+tokens 2x3 | blocks.1: 24 4+tokens 2x3 | blocks.2: 24 4+tokens 2x3 |"
        "norm: 24 4+tokens 2x3",
        {**DEPTH},
    ),
    Family(
        "vit_relpos_small_patch16_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 |"
        "blocks.2: 24 0+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "vit_relpos_base_patch16_cls_224",
        VIT,
        "blocks.0: 24 cls+tokens 2x3 | blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "samvit_base_patch16",  # windows of 2 × 2, the last block looks at all places
        VIT,
        "patch_embed: 24 nhwc 2x3 | blocks.0: 24 nhwc 2x3 | blocks.0.attn: none | blocks.1: 24 nhwc 2x3 |"
        "blocks.2: 24 nhwc 2x3 | blocks.2.attn: 24 nhwc 2x3 | neck: 16 nchw 2x3",
        {"img_size": VIT, **DEPTH, "window_size": 2, "global_attn_indexes": (2,), "neck_chans": 16},
    ),
    Family(
        "vit_tiny_r_s16_p8_224",  # hybrid: a ResNet stem
        CNN,
        "patch_embed.backbone: 64 nchw 16x24 | patch_embed: 24 0+tokens 2x3 | blocks.0: 24 cls+tokens 2x3 |"
        "blocks.1: 24 cls+tokens 2x3 | blocks.2: 24 cls+tokens 2x3",
        {"img_size": CNN, **DEPTH},
    ),
    Family(
        "vitamin_small_224",
        CNN,
        "patch_embed: 384 0+tokens 4x6 | blocks.0: 384 0+tokens 4x6 | blocks.1: 384 0+tokens 4x6 |"
        "blocks.2: 384 0+tokens 4x6",
        {"img_size": CNN, "depth": 3, "num_heads": 2},
    ),
    Family(
        "deepseek_vit_412m_enc",  # the aligner makes one token of 3 × 3 patches
        (84, 126),
        "patch_embed: 24 nhwc 6x9 | blocks.0: 24 0+tokens 6x9 | blocks.1: 24 0+tokens 6x9 | blocks.2: 24 0+tokens 6x9 |"
        "aligner: 32 0+tokens 2x3",
        {"img_size": (84, 126), **DEPTH, "out_features": 32},
    ),
    Family(
        "qwen3_vit_88m_enc",  # the merger makes one token of 2 × 2 patches
        CNN,
        "patch_embed: 24 nhwc 4x6 | blocks.0: 24 0+tokens 4x6 | blocks.1: 24 0+tokens 4x6 | blocks.2: 24 0+tokens 4x6 |"
        "merger: 32 0+tokens 2x3",
        {"img_size": CNN, **DEPTH, "out_features": 32},
    ),
    Family(
        "gemma4_vit_167m_enc",  # its patches come as pixels, beside their coordinates
        (48, 96),
        "patch_embed: none | patch_embed#0: 24 0+tokens 3x6 | blocks.0: 24 0+tokens 3x6 | blocks.1: 24 0+tokens 3x6 |"
        "blocks.2: 24 0+tokens 3x6",
        {"img_size": (48, 96), **DEPTH, "head_dim": 12, "intermediate_size": 32},
    ),
    # --- class tokens that come late, alone or several times ---
    Family(
        "cait_xxs24_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3 |"
        "blocks_token_only.0: 24 cls+tokens | blocks_token_only.1: 24 cls+tokens | norm: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "xcit_nano_12_p16_224",
        VIT,
        "patch_embed: 24 0+tokens 2x3 | blocks.0: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3 |"
        "cls_attn_blocks.0.attn: 24 cls+tokens | cls_attn_blocks.0: 24 cls+tokens 2x3 |"
        "cls_attn_blocks.1: 24 cls+tokens 2x3 | norm: 24 cls+tokens 2x3",
        {"img_size": VIT, **DEPTH},
    ),
    Family(
        "convit_tiny",  # the class token joins after the gated blocks
        (48, 48),
        "patch_embed: 24 0+tokens 3x3 | blocks.0: 24 0+tokens 3x3 | blocks.1: 24 0+tokens 3x3 |"
        "blocks.2: 24 cls+tokens 3x3 | blocks.3: 24 cls+tokens 3x3 | norm: 24 cls+tokens 3x3",
        {"img_size": 48, "embed_dim": 6, "depth": 4, "local_up_to_layer": 2, "num_heads": 4},
    ),
    Family(
        "volo_d1_224",
        VIT,
        "patch_embed: 16 nchw 4x6 | network.0.0: 16 nhwc 4x6 | network.1: 24 nhwc 2x3 | network.3.0: 24 nhwc 2x3 |"
        "post_network.0: 24 cls+tokens 2x3 | post_network.1: 24 cls+tokens 2x3 | norm: 24 cls+tokens 2x3 |"
        "aux_head: 1000 0+tokens 2x3",
        {
            "img_size": VIT,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 24, 24, 24),
            "num_heads": (2, 2, 2, 2),
            "stem_hidden_dim": 8,
        },
        volo._create_volo,
    ),
    Family(
        "coat_tiny",  # every stage has a class token of its own
        CNN,
        "patch_embed1: 16 0+tokens 16x24 | serial_blocks1.0: 16 cls+tokens 16x24 | patch_embed3: 16 0+tokens 4x6 |"
        "serial_blocks3.0: 16 cls+tokens 4x6 | serial_blocks4.0: 16 cls+tokens 2x3 | parallel_blocks.1: none |"
        "parallel_blocks.1#1: 16 cls+tokens 8x12 | parallel_blocks.1#3: 16 cls+tokens 2x3 | norm2: 16 cls+tokens 8x12",
        {**COAT, "parallel_depth": 2, "num_heads": 8},
    ),
    Family(
        "coat_lite_tiny",
        CNN,
        "serial_blocks1.0: 16 cls+tokens 16x24 | serial_blocks2.0: 16 cls+tokens 8x12 |"
        "serial_blocks4.0: 16 cls+tokens 2x3 | norm4: 16 cls+tokens 2x3",
        COAT,
    ),
    Family(
        "crossvit_9_240",  # two branches: patches of 12 and of 16
        (48, 96),
        "patch_embed.0: 16 0+tokens 4x8 | patch_embed.1: 24 0+tokens 3x6 | blocks.0: none |"
        "blocks.0#0: 16 cls+tokens 4x8 | blocks.0#1: 24 cls+tokens 3x6 | blocks.1#0: 16 cls+tokens 4x8 |"
        "blocks.1#1: 24 cls+tokens 3x6 | norm.0: 16 cls+tokens 4x8 | norm.1: 24 cls+tokens 3x6",
        {
            "img_size": (48, 96),
            "img_scale": (1.0, 1.0),
            "embed_dim": (16, 24),
            "num_heads": (2, 2),
            "depth": ((1, 1, 0), (1, 1, 0)),
        },
    ),
    Family(
        "tnt_s_patch16_224",  # pixels within patches [b · patches, 16, 8] beside the patches
        VIT,
        "pixel_embed: none | proj: 24 0+tokens 2x3 | blocks.0: none | blocks.0#0: none |"
        "blocks.0#1: 24 cls+tokens 2x3 | blocks.1#1: 24 cls+tokens 2x3 | blocks.2#1: 24 cls+tokens 2x3 |"
        "norm: 24 cls+tokens 2x3",
        {"img_size": VIT, "depth": 3, "embed_dim": 24, "inner_dim": 8, "num_heads_inner": 2, "num_heads_outer": 2},
    ),
    Family(
        "pit_ti_224",  # overlapping patches of 16 every 8: 7 × 11; maps and the class token travel apart
        CNN,
        "patch_embed: 16 nchw 7x11 | transformers.0.blocks.0: 16 cls+tokens 7x11 | transformers.1: none |"
        "transformers.1.blocks.1: 16 cls+tokens 4x6 | transformers.2.blocks.0: 16 cls+tokens 2x3 |"
        "transformers.2#0: 16 nchw 2x3 | transformers.2#1: 16 cls+tokens | norm: 16 cls+tokens",
        PIT,
    ),
    Family(
        "pit_ti_distilled_224",
        CNN,
        "transformers.0.blocks.0: 16 cls+1+tokens 7x11 | transformers.1.blocks.1: 16 cls+1+tokens 4x6 |"
        "transformers.2.blocks.0: 16 cls+1+tokens 2x3 | norm: 16 cls+1+tokens",
        PIT,
    ),
    # --- pyramids and windows ---
    Family(
        "swin_tiny_patch4_window7_224",
        CNN,
        "patch_embed: 16 nhwc 16x24 | layers.0.blocks.0: 16 nhwc 16x24 | layers.0.blocks.0.attn: none |"
        "layers.2.blocks.1: 64 nhwc 4x6 | layers.3.blocks.0: 128 nhwc 2x3 | norm: 128 nhwc 2x3",
        STAGES,
    ),
    Family(
        "swinv2_tiny_window8_256",
        CNN,
        "layers.0.blocks.0: 16 nhwc 16x24 | layers.2.blocks.1: 64 nhwc 4x6 | layers.3.blocks.0: 128 nhwc 2x3",
        STAGES,
    ),
    Family(
        "swinv2_cr_tiny_224",  # stages channels first, the blocks within channels last
        CNN,
        "patch_embed: 16 nchw 16x24 | stages.0.blocks.0: 16 nhwc 16x24 | stages.1: 32 nchw 8x12 |"
        "stages.2.blocks.1: 64 nhwc 4x6 | stages.3.blocks.0: 128 nhwc 2x3 | stages.3: 128 nchw 2x3",
        STAGES,
    ),
    Family(
        "hiera_tiny_224",  # tokens in the order that pools by striding; raster again when the strides are used up
        CNN,
        "patch_embed: 8 0+tokens 16x24 | blocks.0: 8 0+tokens 16x24 unrolled3 | blocks.1: 16 0+tokens 8x12 unrolled2 |"
        "blocks.2: 32 0+tokens 4x6 unrolled1 | blocks.3: 32 0+tokens 4x6 unrolled1 | blocks.4: 64 0+tokens 2x3",
        {"img_size": CNN, "embed_dim": 8, "stages": (1, 1, 2, 1)},
    ),
    Family(
        "sam2_hiera_tiny",
        CNN,
        "patch_embed: 8 nhwc 16x24 | blocks.0: 8 nhwc 16x24 | blocks.1: 16 nhwc 8x12 | blocks.3: 32 nhwc 4x6 |"
        "blocks.5: 64 nhwc 2x3 | head.norm: 64 vector",
        {"embed_dim": 8, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)},
    ),
    Family(
        "mvitv2_tiny",
        (64, 64),
        "patch_embed: 8 0+tokens 16x16 | stages.0.blocks.0: 8 0+tokens 16x16 | stages.1.blocks.0: 16 0+tokens 8x8 |"
        "stages.2.blocks.1: 32 0+tokens 4x4 | stages.3: 64 0+tokens 2x2 | norm: 64 0+tokens 2x2",
        {"img_size": 64},
        _mvit,
    ),
    Family(
        "mvitv2_small_cls",
        (64, 64),
        "patch_embed: 8 0+tokens 16x16 | stages.0.blocks.0: 8 cls+tokens 16x16 | stages.2.blocks.1: 32 cls+tokens 4x4 |"
        "stages.3.blocks.0: 64 cls+tokens 2x2 | norm: 64 cls+tokens 2x2",
        {"img_size": 64},
        _mvit,
    ),
    Family(
        "pvt_v2_b0",
        CNN,
        "patch_embed: 8 nhwc 16x24 | stages.0.blocks.0: 8 0+tokens 16x24 | stages.1: 8 nchw 8x12 |"
        "stages.2.blocks.0: 16 0+tokens 4x6 | stages.3.blocks.0: 16 0+tokens 2x3 | stages.3: 16 nchw 2x3",
        {**PYRAMID, "depths": (1, 1, 1, 1)},
    ),
    Family(
        "twins_pcpvt_small",
        CNN,
        "blocks.0.0: 8 0+tokens 16x24 | pos_block.0: 8 0+tokens 16x24 | blocks.2.0: 16 0+tokens 4x6 |"
        "blocks.3.0: 16 0+tokens 2x3 | norm: 16 0+tokens 2x3",
        {**PYRAMID, "img_size": CNN},
    ),
    Family(
        "twins_svt_small",
        CNN,
        "blocks.0.0: 8 0+tokens 16x24 | blocks.2.0: 16 0+tokens 4x6 | blocks.2.1: 16 0+tokens 4x6 |"
        "blocks.3.0: 16 0+tokens 2x3",
        {**PYRAMID, "img_size": CNN, "wss": (2, 2, 2, 2)},
    ),
    Family(
        "nest_tiny",  # a stage works on blocks of places [b, blocks, 16, c]
        (64, 64),
        "patch_embed: 8 nchw 16x16 | levels.0: 8 nchw 16x16 | levels.0.transformer_encoder.0: none |"
        "levels.1: 16 nchw 8x8 | levels.2: 32 nchw 4x4 | norm: 32 nhwc 4x4",
        {"img_size": 64, "embed_dims": (8, 16, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 2)},
        nest._create_nest,
    ),
    Family(
        "gcvit_xxtiny",  # stages channels first, the blocks within channels last
        CNN,
        "stages.0.blocks.0: 8 nhwc 16x24 | stages.1.global_block: 16 nchw 2x3 | stages.1.global_norm: 16 nhwc 2x3 |"
        "stages.2.blocks.1: 32 nhwc 4x6 | stages.2: 32 nchw 4x6 | stages.3.blocks.0: 64 nhwc 2x3 |"
        "stages.3: 64 nchw 2x3",
        {"img_size": CNN, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)},
        gcvit._create_gcvit,
    ),
    Family(
        "davit_tiny",
        CNN,
        "stages.0.blocks.0.0: 8 nchw 16x24 | stages.1.blocks.0.0.norm1: 8 0+tokens 8x12 |"
        "stages.1.blocks.0.1: 8 nchw 8x12 | stages.2.blocks.0: 16 nchw 4x6 | stages.3.blocks.0.1: 16 nchw 2x3",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "window_size": 2},
    ),
    Family(
        "focalnet_tiny_srf",
        CNN,
        "layers.0.blocks.0: 8 nchw 16x24 | layers.2.blocks.0: 32 nchw 4x6 | layers.3.blocks.0: 64 nchw 2x3 |"
        "norm: 64 nchw 2x3",
        {"embed_dim": 8, "depths": (1, 1, 2, 1)},
        focalnet._create_focalnet,
    ),
    Family(
        "tiny_vit_5m_224",  # convolutions channels first, attention channels last
        CNN,
        "patch_embed: 8 nchw 16x24 | stages.0.blocks.0: 8 nchw 16x24 | stages.1.blocks.0: 8 nhwc 8x12 |"
        "stages.2.blocks.1: 16 nhwc 4x6 | stages.2: 16 nchw 4x6 | stages.3.blocks.0: 16 nhwc 2x3",
        {**PYRAMID, "window_sizes": (2, 2, 2, 2)},
    ),
    Family(
        "levit_128s",
        CNN,
        "stem: 16 nchw 4x6 | stages.0.blocks.0: 16 0+tokens 4x6 | stages.1.blocks.1: 24 0+tokens 2x3 |"
        "stages.2.blocks.0: 32 0+tokens 1x2 | head: 1000 vector",
        LEVIT,
    ),
    Family(
        "levit_conv_128s",
        CNN,
        "stages.0.blocks.0: 16 nchw 4x6 | stages.1.blocks.1: 24 nchw 2x3 | stages.2.blocks.0: 32 nchw 1x2",
        LEVIT,
    ),
    # --- convolutions and attention in one model ---
    Family(
        "test_maxvit",  # attention over windows and grids is channels last
        (64, 128),
        "stages.0.blocks.0: 32 nchw 16x32 | stages.1.blocks.0.attn_block: 64 nhwc 8x16 |"
        "stages.2.blocks.0: 96 nchw 4x8 | stages.3.blocks.0.attn_grid: 128 nhwc 2x4 | stages.3.blocks.0: 128 nchw 2x4",
        {"img_size": (64, 128)},
    ),
    Family(
        "test_coatnet",
        CNN,
        "stages.0.blocks.0: 32 nchw 16x24 | stages.2.blocks.1: 96 nchw 4x6 | stages.3.blocks.0: 128 nchw 2x3",
        {"img_size": CNN},
    ),
    Family(
        "mobilevit_xxs",  # the transformer sees [b · pixels of a patch, patches, c]
        (64, 128),
        "stages.1.1: 24 nchw 16x32 | stages.2.1.transformer.0: none | stages.2.1: 48 nchw 8x16 |"
        "stages.3.1: 64 nchw 4x8 | stages.4.1: 80 nchw 2x4",
    ),
    Family(
        "mobilevitv2_050",  # the transformer sees [b, c, pixels of a patch, patches]
        (64, 128),
        "stages.1.1: 64 nchw 16x32 | stages.2.1.transformer.0: none | stages.2.1: 128 nchw 8x16 |"
        "stages.4.1: 256 nchw 2x4",
    ),
    Family(
        "efficientformer_l1",  # its last blocks run on tokens; attention is made for 7 × 7 places alone
        (224, 224),
        "stages.0.blocks.0: 8 nchw 56x56 | stages.2.blocks.0: 16 nchw 14x14 | stages.3.blocks.1: 16 nchw 7x7 |"
        "stages.3.blocks.2: 16 0+tokens 7x7 | stages.3.blocks.3: 16 0+tokens 7x7 | norm: 16 0+tokens 7x7",
        {"depths": (1, 1, 1, 3), "embed_dims": (8, 8, 16, 16), "num_vit": 1},
    ),
    Family(
        "efficientformerv2_s0",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.1: 16 nchw 4x6 | stages.3.blocks.1: 16 nchw 2x3",
        {"img_size": CNN, "depths": (1, 1, 2, 2), "embed_dims": (8, 8, 16, 16)},
    ),
    Family(
        "efficientvit_b0",
        CNN,
        "stages.0.blocks.0: 16 nchw 16x24 | stages.2.blocks.1: 64 nchw 4x6 | stages.3.blocks.2: 128 nchw 2x3",
    ),
    Family(
        "efficientvit_m0",
        (64, 64),
        "patch_embed: 16 nchw 4x4 | stages.0: 16 nchw 4x4 | stages.1: 24 nchw 2x2 | stages.2: 32 nchw 1x1",
        {
            "img_size": 64,
            "embed_dim": (16, 24, 32),
            "key_dim": (4, 4, 4),
            "depth": (1, 1, 2),
            "num_heads": (2, 2, 2),
            "window_size": (2, 2, 2),
        },
    ),
    Family(
        "efficientvim_m1",  # beside the map, 49 hidden states of the state-space model: vectors of no place, no layout
        CNN,
        "patch_embed: 8 nchw 4x6 | stages.0: none | stages.0#0: 8 nchw 4x6 | stages.0#2: none | norm.0: none |"
        "stages.1#0: 16 nchw 2x3 | stages.2#0: 24 nchw 1x2 | norm.3: 24 nchw 1x2",
        {"embed_dim": (8, 16, 24)},
    ),
    Family(
        "edgenext_xx_small",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.1.xca: 16 0+tokens 4x6 | stages.2.blocks.1: 16 nchw 4x6 |"
        "stages.3.blocks.1: 32 nchw 2x3",
        {"depths": (1, 1, 2, 2), "dims": (8, 16, 16, 32), "heads": (2, 2, 2, 2)},
    ),
    Family(
        "caformer_s18",  # convolutions on maps, attention on tokens
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.1.blocks.0: 16 nchw 8x12 | stages.2.blocks.1: 32 0+tokens 4x6 |"
        "stages.2: 32 nchw 4x6 | stages.3.blocks.0: 64 0+tokens 2x3 | stages.3: 64 nchw 2x3",
        {**FORMER, **ATTENTION},
        metaformer._create_metaformer,
    ),
    Family(
        "poolformer_s12",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.1: 32 nchw 4x6 | stages.3.blocks.0: 64 nchw 2x3",
        FORMER,
        metaformer._create_metaformer,
    ),
    Family(
        "swiftformer_xs",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.1: 16 nchw 4x6 | stages.3.blocks.0: 16 nchw 2x3",
        {"layers": [1, 1, 2, 1], "embed_dims": [8, 8, 16, 16]},
    ),
    Family(
        "nextvit_small",
        CNN,
        "stages.0.blocks.0: 96 nchw 16x24 | stages.2.blocks.4: 512 nchw 4x6 | stages.3.blocks.0: 1024 nchw 2x3",
        {"depths": (1, 1, 5, 1)},
    ),
    Family(
        "iformer_s",
        CNN,
        "stages.0: 8 nchw 16x24 | stages.1: 16 nchw 8x12 | stages.2: 24 nchw 4x6 | stages.3: 32 nchw 2x3",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 9, 6)},
    ),
    Family(
        "shvit_s1",
        CNN,
        "patch_embed: 16 nchw 4x6 | stages.0: 16 nchw 4x6 | stages.1: 24 nchw 2x3 | stages.2: 32 nchw 1x2",
        {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "depth": (1, 2, 2)},
    ),
    Family(
        "csatv2",
        (128, 192),
        "stem_dct: 8 nchw 16x24 | stages.0.0: 8 nchw 16x24 | stages.2.2: 24 nchw 4x6 | stages.3.1: 32 nchw 2x3",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 3, 2), "transformer_depths": (0, 0, 1, 1)},
    ),
    Family(
        "visformer_tiny",
        CNN,
        "stage1.0: 8 nchw 8x12 | stage2.1: 16 nchw 4x6 | stage3.0: 32 nchw 2x3 | norm: 32 nchw 2x3",
        {"img_size": CNN, "init_channels": 8, "embed_dim": 16, "depth": (1, 2, 1), "num_heads": 2},
    ),
    Family("lowformer_b0", CNN, "stages.0.0: 32 nchw 16x24 | stages.2.3: 128 nchw 4x6 | stages.3.4: 256 nchw 2x3"),
    Family("cpubone_nano", CNN, "stages.0.0: 24 nchw 16x24 | stages.2.1: 96 nchw 4x6 | stages.3.2: 192 nchw 2x3"),
    Family(
        "botnet26t_256",
        CNN,
        "stages.0.0: 64 nchw 16x24 | stages.2.1: 256 nchw 4x6 | stages.3.1: 512 nchw 2x3",
        {"img_size": CNN, "width_factor": 0.25},
    ),
    Family(
        "halonet26t",  # halos want 8 × 8 places at a stride of 32
        (256, 256),
        "stages.0.0: 64 nchw 64x64 | stages.2.1: 256 nchw 16x16 | stages.3.1: 512 nchw 8x8",
        {"width_factor": 0.25},
    ),
    # --- mixers ---
    Family(
        "mixer_s16_224",
        VIT,
        "stem: 24 0+tokens 2x3 | blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3 |"
        "norm: 24 0+tokens 2x3",
        BLOCKS,
        mlp_mixer._create_mixer,
    ),
    Family(
        "resmlp_12_224",
        VIT,
        "blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3",
        {**BLOCKS, "mlp_ratio": 4, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine},
        mlp_mixer._create_mixer,
    ),
    Family(
        "gmlp_ti16_224",
        VIT,
        "blocks.0: 24 0+tokens 2x3 | blocks.1: 24 0+tokens 2x3 | blocks.2: 24 0+tokens 2x3",
        {**BLOCKS, "mlp_ratio": 6, "block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": mlp_mixer.GatedMlp},
        mlp_mixer._create_mixer,
    ),
    Family(
        "sequencer2d_s",  # patches of 7; LSTMs along rows and columns
        (56, 84),
        "stem: 8 nhwc 8x12 | stages.0.blocks.0: 8 nhwc 8x12 | stages.1.blocks.0: 16 nhwc 4x6 |"
        "stages.3.blocks.0: 16 nhwc 2x3 | norm: 16 nhwc 2x3",
        {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "hidden_sizes": (4, 4, 4, 4)},
        sequencer._create_sequencer2d,
    ),
    Family(
        "convmixer_768_32",
        CNN,
        "stem: 16 nchw 8x12 | blocks.0: 16 nchw 8x12 | blocks.1: 16 nchw 8x12 | blocks.2: 16 nchw 8x12",
        {"dim": 16, "depth": 3, "kernel_size": 3, "patch_size": 8},
        convmixer._create_convmixer,
    ),
    Family(
        "test_mambaout",  # channels last throughout
        CNN,
        "stem: 16 nhwc 16x24 | stages.0.blocks.0: 16 nhwc 16x24 | stages.2.blocks.1: 48 nhwc 4x6 |"
        "stages.3.blocks.0: 64 nhwc 2x3",
    ),
    # --- convolutions: all channels first ---
    Family(
        "convnext_tiny",  # but for the linear layers within a block
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.0.mlp.fc1: 64 nhwc 4x6 | stages.2.blocks.1: 16 nchw 4x6 |"
        "stages.3.blocks.0: 16 nchw 2x3 | head.flatten: 16 vector",
        {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)},
    ),
    Family(
        "convnextv2_atto",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.1: 16 nchw 4x6 | stages.3.blocks.0: 16 nchw 2x3",
        {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)},
    ),
    Family(
        "inception_next_atto",
        CNN,
        "stages.0.blocks.0: 16 nchw 16x24 | stages.2.blocks.1: 32 nchw 4x6 | stages.3.blocks.0: 32 nchw 2x3",
        {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 32)},
    ),
    Family(
        "test_resnet",
        CNN,
        "layer1.0: 32 nchw 16x24 | layer3.0: 192 nchw 4x6 | layer4.0: 96 nchw 2x3 | fc: 99 vector",
        {"num_classes": 99},
    ),
    Family(
        "resnetv2_50",
        CNN,
        "stages.0.blocks.0: 64 nchw 16x24 | stages.2.blocks.0: 256 nchw 4x6 | stages.3.blocks.0: 512 nchw 2x3",
        {"layers": (1, 1, 1, 1), "width_factor": 0.25},
    ),
    Family(
        "res2net50_26w_4s",
        CNN,
        "layer1.0: 64 nchw 16x24 | layer3.0: 128 nchw 4x6 | layer4.0: 128 nchw 2x3",
        LAYERS,
    ),
    Family(
        "resnest14d",
        CNN,
        "layer1.0: 64 nchw 16x24 | layer3.0: 128 nchw 4x6 | layer4.0: 128 nchw 2x3",
        {"channels": (16, 16, 32, 32)},
    ),
    Family("skresnet18", CNN, "layer1.0: 16 nchw 16x24 | layer3.0: 32 nchw 4x6 | layer4.0: 32 nchw 2x3", LAYERS),
    Family(
        "legacy_seresnet18",
        CNN,
        "layer1.0: 64 nchw 16x24 | layer3.0: 256 nchw 4x6 | layer4.0: 512 nchw 2x3",
        {"layers": (1, 1, 1, 1)},
    ),
    Family("test_nfnet", CNN, "stages.0.0: 32 nchw 16x24 | stages.2.0: 96 nchw 4x6 | stages.3.0: 128 nchw 2x3"),
    Family("regnetx_002", CNN, "s1.b1: 24 nchw 16x24 | s3.b2: 152 nchw 4x6 | s4.b7: 368 nchw 2x3"),
    Family("test_byobnet", CNN, "stages.0.0: 32 nchw 16x24 | stages.2.0: 128 nchw 4x6 | stages.3.0: 256 nchw 2x3"),
    Family(
        "repvgg_a0",
        CNN,
        "stages.0.0: 16 nchw 16x24 | stages.2.5: 48 nchw 4x6 | stages.3.0: 320 nchw 2x3",
        {"width_factor": 0.25},
    ),
    Family(
        "mobileone_s1",
        CNN,
        "stages.0.0: 64 nchw 16x24 | stages.2.5: 512 nchw 4x6 | stages.3.0: 512 nchw 2x3",
    ),
    Family(
        "lambda_resnet26t",
        CNN,
        "stages.0.0: 64 nchw 16x24 | stages.2.1: 256 nchw 4x6 | stages.3.1: 512 nchw 2x3",
        {"width_factor": 0.25},
    ),
    Family("test_efficientnet", CNN, "blocks.0.0: 16 nchw 32x48 | blocks.2.0: 32 nchw 8x12 | blocks.4.0: 64 nchw 2x3"),
    Family(
        "mobilenetv3_small_050",
        CNN,
        "blocks.0.0: 8 nchw 16x24 | blocks.3.1: 24 nchw 4x6 | blocks.5.0: 288 nchw 2x3 | flatten: 1024 vector",
    ),
    Family(
        "mobilenetv4_conv_small_035",
        CNN,
        "blocks.0.0: 16 nchw 16x24 | blocks.2.3: 32 nchw 4x6 | blocks.4.0: 336 nchw 2x3",
    ),
    Family(
        "mobilenetv5_300m_enc",
        CNN,
        "blocks.0.0: 16 nchw 16x24 | blocks.2.1: 32 nchw 4x6 | blocks.3.1: 32 nchw 2x3 | msfa: 2048 nchw 2x2",
        {
            "stem_size": 8,
            "msfa_output_resolution": 2,
            "act_layer": nn.GELU,
            "layer_scale_init_value": 0.1,
        },
        _mobilenetv5,
    ),
    Family("hardcorenas_a", CNN, "blocks.0.0: 16 nchw 32x48 | blocks.3.0: 80 nchw 4x6 | blocks.6.0: 960 nchw 2x3"),
    Family("ghostnet_050", CNN, "blocks.1.0: 12 nchw 16x24 | blocks.5.0: 40 nchw 4x6 | blocks.8.1: 80 nchw 2x3"),
    Family("repghostnet_050", CNN, "blocks.1.0: 12 nchw 16x24 | blocks.5.0: 40 nchw 4x6 | blocks.8.1: 80 nchw 2x3"),
    Family("rexnet_100", CNN, "features.2: 38 nchw 16x24 | features.8: 106 nchw 4x6 | features.15: 185 nchw 2x3"),
    Family(
        "lcnetv2_small",
        CNN,
        "stages.0.0: 32 nchw 16x24 | stages.2.1: 128 nchw 4x6 | stages.3.0: 256 nchw 2x3",
        {"depths": (1, 1, 2, 1), "scale": 0.25},
    ),
    Family(
        "repvit_m0_9",
        CNN,
        "stages.0: 8 nchw 16x24 | stages.2.blocks.1: 16 nchw 4x6 | stages.3.blocks.0: 16 nchw 2x3",
        {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 2, 1)},
    ),
    Family(
        "fastvit_sa12",
        CNN,
        "stages.0.blocks.0: 8 nchw 16x24 | stages.2.blocks.0: 16 nchw 4x6 | stages.3.blocks.0: 32 nchw 2x3",
        {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32)},
    ),
    Family(
        "fasternet_t0",
        CNN,
        "stages.0.blocks.0: 16 nchw 16x24 | stages.2.blocks.1: 64 nchw 4x6 | stages.3.blocks.0: 128 nchw 2x3",
        {"embed_dim": 16, "depths": (1, 1, 2, 1)},
    ),
    Family("starnet_s050", CNN, "stages.0: 16 nchw 16x24 | stages.2: 64 nchw 4x6 | stages.3: 128 nchw 2x3"),
    Family("hgnetv2_b0", CNN, "stages.0: 64 nchw 16x24 | stages.2: 512 nchw 4x6 | stages.3: 1024 nchw 2x3"),
    Family("cs3darknet_s", CNN, "stages.0: 64 nchw 16x24 | stages.2: 256 nchw 4x6 | stages.3: 512 nchw 2x3"),
    Family(
        "cspnext_tiny",
        CNN,
        "stages.0.1: 48 nchw 16x24 | stages.2.1: 192 nchw 4x6 | stages.3.2: 384 nchw 2x3",
        {"depths": (1, 1, 1, 1)},
    ),
    Family("ese_vovnet19b_slim", CNN, "stages.0: 112 nchw 16x24 | stages.2: 384 nchw 4x6 | stages.3: 512 nchw 2x3"),
    Family(
        "densenet121",
        CNN,
        "features.denseblock1: 32 nchw 16x24 | features.denseblock3.denselayer1: 8 nchw 4x6 |"
        "features.denseblock4: 32 nchw 2x3",
        {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    ),
    Family(
        "rdnet_tiny",
        CNN,
        "dense_stages.0: 128 nchw 16x24 | dense_stages.3: 232 nchw 4x6 | dense_stages.6: 344 nchw 2x3",
        {"num_blocks_list": (1,) * 7},
    ),
    Family(
        "dpn48b",  # two paths until they are joined
        CNN,
        "features.conv2_1: 112 nchw 16x24 | features.conv4_1: 352 nchw 4x6 | features.conv5_1: 704 nchw 2x3",
        {"k_sec": (1, 1, 2, 1)},
    ),
    Family(
        "dla46_c",
        CNN,
        "level2.tree1: 64 nchw 16x24 | level4.tree2.root: 128 nchw 4x6 | level5: 256 nchw 2x3 |"
        "global_pool: 256 nchw 1x1",
    ),
    Family(
        "hrnet_w18_small",  # up to four resolutions side by side
        CNN,
        "layer1.0: 128 nchw 16x24 | stage3.0: none | stage3.0#1: 32 nchw 8x12 | stage4.0#0: 16 nchw 16x24 |"
        "stage4.0#3: 128 nchw 2x3 | final_layer: 2048 nchw 2x3",
    ),
    Family(
        "selecsls42",
        CNN,
        "features.0: none | features.1#0: 128 nchw 16x24 | features.3#0: 288 nchw 8x12 | features.5#1: 304 nchw 4x6 |"
        "from_seq: 480 nchw 4x6 | head.3: 1280 nchw 1x2",
    ),
    Family(
        "tresnet_m",
        CNN,
        "body.layer1.0: 16 nchw 16x24 | body.layer3.0: 256 nchw 4x6 | body.layer4.0: 512 nchw 2x3",
        {"layers": [1, 1, 1, 1], "width_factor": 0.25},
    ),
    Family(
        "vgg11",
        CNN,
        "features.5: 128 nchw 16x24 | features.11: 512 nchw 8x12 | features.20: 512 nchw 2x3",
        {"mlp_ratio": 0.01},
    ),
    Family("legacy_xception", CNN, "block2: 256 nchw 8x12 | block6: 728 nchw 4x6 | block12: 1024 nchw 2x3"),
    Family("xception41", CNN, "blocks.0: 128 nchw 16x24 | blocks.6: 728 nchw 4x6 | blocks.12: 2048 nchw 2x3"),
    Family("inception_v3", (96, 96), "Mixed_5b: 256 nchw 9x9 | Mixed_6c: 768 nchw 4x4 | Mixed_7c: 2048 nchw 1x1"),
    Family(
        "inception_v4", (96, 96), "features.5: 384 nchw 9x9 | features.13: 1024 nchw 4x4 | features.21: 1536 nchw 1x1"
    ),
    Family(
        "inception_resnet_v2", (96, 96), "mixed_5b: 320 nchw 9x9 | repeat_1.9: 1088 nchw 4x4 | block8: 2080 nchw 1x1"
    ),
    Family(
        "nasnetalarge",
        CNN,
        "cell_0: 48 nchw 8x12 | cell_8: 96 nchw 4x6 | cell_17: 192 nchw 2x3",
        {"stem_size": 8, "num_features": 192},
    ),
)

LEFT_OUT = {"pnasnet": "86 million parameters whatever the options; cells like those of NASNet, which is here"}
"""Modules of timm without a family above, and why."""
