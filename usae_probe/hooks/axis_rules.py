"""What each aten operation does to named axes: one rule a group of operations, found by the operation's name.

A rule gets the call and the number of the output, and returns that output's axes. The tracer checks them against the
output's shape, so a rule need not look after outputs that are of no interest (saved statistics, say).
"""

from __future__ import annotations

from .axis_algebra import (
    NOTHING,
    PLACES,
    Axes,
    Axis,
    broadcast,
    core,
    join,
    length,
    like,
    meanings,
    new_axis,
    resized,
    unify,
)
from .axis_views import VIEWS, Call, LostError, Rule, is_list, replaced, shape_of

# ---- values, place by place


def _keep(call: Call, index: int) -> Axes:
    return call.axes("input" if "self" not in call.given else "self")


def _pointwise(call: Call, index: int) -> Axes:
    return broadcast(call.operands(), shape_of(call, index))


def _halved(call: Call, index: int) -> Axes:
    return resized(call.axes(), shape_of(call, index))


def _cat(call: Call, index: int) -> Axes:
    tensors = [tensor for tensor in call.given["tensors"] if tensor.dim() == call.outputs[index].dim()]
    dim = call.given["dim"] % call.outputs[index].dim()
    found = [call.axes_of(tensor) for tensor in tensors]
    if all(axes is None for axes in found):
        raise LostError
    lengths = [tensor.shape[dim] for tensor in tensors]
    parts = [axes[dim] if axes else new_axis("unknown", n) for axes, n in zip(found, lengths, strict=True)]
    # Axes other than `dim` are shared: make `dim` alike too, so that they broadcast.
    others = [replaced(axes, dim, NOTHING) for axes in found if axes is not None]
    shape = list(shape_of(call, index))
    shape[dim] = 1
    named = [part or new_axis("unknown", 1) for part in parts]
    return replaced(broadcast(others, shape), dim, join(named))


def _stack(call: Call, index: int) -> Axes:
    found = call.operands()
    dim = call.given["dim"] % call.outputs[index].dim()
    shape = list(shape_of(call, index))
    n = shape.pop(dim)
    axes = broadcast(found, shape)
    return (*axes[:dim], new_axis("unknown", n) if n > 1 else NOTHING, *axes[dim:])


# ---- maps


def _map(call: Call, index: int) -> Axes:
    """Pooling, upsampling, padding: an axis whose length changes is a new one that counts the same."""
    return resized(call.axes(), shape_of(call, index))


def _pad(call: Call, index: int) -> Axes:
    """Constants before and after: a map's side is a new one of the same meaning, tokens get unknown neighbours."""
    axes, pad = list(call.axes()), list(call.given["pad"])
    for dim, n in enumerate(shape_of(call, index)):
        at = 2 * (len(axes) - 1 - dim)
        before, after = (pad[at], pad[at + 1]) if at + 1 < len(pad) else (0, 0)
        axis = axes[dim]
        if n != length(axis) and before >= 0 <= after and meanings(axis) >= PLACES:
            axes[dim] = join([new_axis("unknown", before), axis, new_axis("unknown", after)])
        elif n != length(axis):
            axes[dim] = like(axis, n)
    return tuple(axes)


def _convolution(call: Call, index: int) -> Axes:
    axes, shape = call.axes("input" if "input" in call.given else "self"), shape_of(call, index)
    places = list(resized((NOTHING, NOTHING, *axes[2:]), (1, 1, *shape[2:])))[2:]
    if len(places) == 2:
        for i, meaning in enumerate(("row", "column")):
            if meanings(places[i]) <= {"unknown"}:
                places[i] = new_axis("row" if meaning == "row" else "column", shape[2 + i])
    return (axes[0], new_axis("channel", shape[1]), *places)


def _new_map(call: Call, index: int) -> Axes:
    """Pixel shuffle, fold, grid sampling: [b,c,h,w] with new channels and places."""
    axes, shape = call.axes("input" if "input" in call.given else "self"), shape_of(call, index)
    rows, columns = new_axis("row", shape[2]), new_axis("column", shape[3])
    return (axes[0], new_axis("channel", shape[1]), rows, columns)


def _im2col(call: Call, index: int) -> Axes:
    """Patches [b,c·k·k,places]: the places are a grid of their own, row by row."""
    given, shape = call.given, shape_of(call, index)
    sides = [
        (n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for n, kernel, dilation, pad, stride in zip(
            given["self"].shape[-2:],
            *(given[key] for key in ("kernel_size", "dilation", "padding", "stride")),
            strict=True,
        )
    ]
    grid = new_axis("row", sides[0]) + new_axis("column", sides[1])
    return (call.axes()[0], new_axis("channel", shape[1]), grid)


# ---- products


def _made_rows(axis: Axis) -> Axis:
    """Rows of a left operand: those of a weight are channels (W x), those of a token that is learned stay."""
    weight = any(digit.base.name.rpartition(".")[2].endswith("weight") for digit in core(axis))
    return new_axis("channel", length(axis)) if weight and length(axis) > 1 else axis


def _made_columns(axis: Axis) -> Axis:
    """Columns of a right operand: those of a weight are channels."""
    return new_axis("channel", length(axis)) if meanings(axis) <= {"parameter", "unknown"} else axis


_LEFT_RIGHT = {
    "mm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "_addmm_activation": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "matmul": ("self", "other"),
}


def _product(call: Call, index: int) -> Axes:
    names = _LEFT_RIGHT[call.name]
    call.operands()
    left, right = (call.axes_or_new(name) for name in names)
    if len(right) == 1:
        return left[:-1]
    columns = _made_columns(right[-1])
    if len(left) == 1:
        return (*right[:-2], columns)
    if call.name == "addbmm":
        return (_made_rows(left[1]), columns)
    shared = broadcast([left[:-2], right[:-2]], shape_of(call, index)[:-2])
    return (*shared, _made_rows(left[-2]), columns)


def _linear(call: Call, index: int) -> Axes:
    axes = call.axes("input" if "input" in call.given else "self")
    return (*axes[:-1], new_axis("channel", shape_of(call, index)[-1]))


def _attention(call: Call, index: int) -> Axes:
    query, key, value = (call.axes_or_new(name) for name in ("query", "key", "value"))
    call.operands()
    # [b,heads,T,d], but [b,T,heads,d] in the kernels' own order: shared are the axes that key and query have alike.
    shared = (0, 2) if call.name in ("_flash_attention_forward", "_efficient_attention_forward") else (0, 1)
    axes = list(query)
    if len(query) == len(key) == 4:
        for dim in shared:
            if length(query[dim]) == length(key[dim]):
                axes[dim] = unify(query[dim], key[dim])
    axes[-1] = value[-1]
    return tuple(axes)


def _fused_attention(call: Call, index: int) -> Axes:
    if index:
        raise LostError
    axes = call.axes("query" if "query" in call.given else "src")
    return (*axes[:-1], new_axis("channel", length(axes[-1])))


# ---- reductions and choices


def _reduce(call: Call, index: int) -> Axes:
    axes, given = call.axes(), call.given.get("dim")
    dims = range(len(axes)) if given is None or given == [] else given if is_list(given) else [given]
    gone = {dim % len(axes) for dim in dims} if axes else set()
    if call.given.get("keepdim", False):
        return tuple(like(axis, 1) if i in gone else axis for i, axis in enumerate(axes))
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def _choose(call: Call, index: int) -> Axes:
    """Gather, top-k, sort: what stands where along `dim` depends on values; the other axes stay."""
    axes, shape = call.axes(), shape_of(call, index)
    given = call.given.get("dim", -1)
    dim = given % len(axes)
    return replaced(
        resized(axes, (*shape[:dim], length(axes[dim]), *shape[dim + 1 :])), dim, _chosen(axes[dim], shape[dim])
    )


def _chosen(axis: Axis, size: int) -> Axis:
    return new_axis("channel" if meanings(axis) == {"channel"} else "unknown", size)


def _index(call: Call, index: int) -> Axes:
    """`x[:, ids]` with one vector of ids."""
    axes, ids = call.axes(), call.given["indices"]
    used = [i for i, item in enumerate(ids) if item is not None]
    if len(used) != 1:
        raise LostError
    (dim,) = used
    if ids[dim].dim() != 1:
        raise LostError
    return replaced(axes, dim, _chosen(axes[dim], call.outputs[index].shape[dim]))


def _embedding(call: Call, index: int) -> Axes:
    axes = call.axes("indices")
    return (*axes, new_axis("channel", shape_of(call, index)[-1]))


def _recurrent(call: Call, index: int) -> Axes:
    """One layer of a recurrent network: [T,b,c] to [T,b,hidden]."""
    if index:
        raise LostError
    axes = call.axes("input")
    return (*axes[:-1], new_axis("channel", shape_of(call, index)[-1]))


_GROUPS: list[tuple[Rule, str]] = [
    *VIEWS,
    (
        _keep,
        "clone contiguous alias alias_copy detach _to_copy lift_fresh lift_fresh_copy lift zeros_like ones_like "
        "empty_like full_like rand_like randn_like roll flip _conj conj_physical "
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update native_layer_norm native_group_norm "
        "_fused_rms_norm rms_norm layer_norm group_norm batch_norm instance_norm "
        "softmax _softmax log_softmax _log_softmax _safe_softmax _masked_softmax cumsum cumprod logcumsumexp cummax "
        "cummin native_dropout _fused_dropout dropout bernoulli renorm tril triu channel_shuffle "
        "native_channel_shuffle fill zero index_put masked_scatter scatter scatter_add index_add index_copy "
        "index_fill uniform normal",
    ),
    (_pointwise, "where masked_fill copy hardswish _prelu_kernel prelu rrelu_with_noise log_sigmoid_forward"),
    (_halved, "glu"),
    (_cat, "cat concat concatenate"),
    (_stack, "stack"),
    (
        _map,
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pad "
        "max_pool2d_with_indices mkldnn_max_pool2d max_pool2d max_pool1d avg_pool1d avg_pool2d quantized_max_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d mkldnn_adaptive_avg_pool2d "
        "fractional_max_pool2d upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_linear1d "
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    (
        _convolution,
        "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution miopen_convolution "
        "cudnn_convolution_relu cudnn_convolution_add_relu miopen_depthwise_convolution _conv_depthwise2d "
        "_slow_conv2d_forward conv1d conv2d thnn_conv2d slow_conv_dilated2d mps_convolution",
    ),
    (_pad, "constant_pad_nd"),
    (_new_map, "pixel_shuffle pixel_unshuffle col2im grid_sampler grid_sampler_2d cudnn_grid_sampler"),
    (_im2col, "im2col"),
    (_product, " ".join(_LEFT_RIGHT)),
    (_linear, "linear mkldnn_linear"),
    (
        _attention,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable "
        "_flash_attention_forward _efficient_attention_forward",
    ),
    (_fused_attention, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    (
        _reduce,
        "sum mean amax amin max min var std var_mean std_mean logsumexp prod norm linalg_vector_norm any all argmax "
        "argmin median nanmedian nanmean nansum aminmax count_nonzero",
    ),
    (_choose, "gather index_select topk sort argsort kthvalue take_along_dim"),
    (_index, "index _unsafe_index"),
    (_embedding, "embedding"),
    (_recurrent, "mkldnn_rnn_layer _cudnn_rnn miopen_rnn lstm gru rnn_tanh rnn_relu"),
]
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
"""The rule of each operation that has one."""
POINTWISE: Rule = _pointwise
"""The rule of every other operation that torch tags as pointwise."""
