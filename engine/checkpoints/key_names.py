"""Clean a state dict's keys: wrappers, counters and pruning go, other authors' names are ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.torch_file import StoredTensor
from letheon.engine.checkpoints.weights_file import Value
from letheon.errors import InputError, join_few

V = TypeVar("V")
Mean = tuple[float, ...]

_COUNTERS = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")


def load(value: Value) -> Tensor:
    """Read a tensor's numbers."""
    return value.load() if isinstance(value, StoredTensor) else value


def clean_keys(state: Mapping[str, Value]) -> dict[str, Value]:
    """Drop the marks of torch.compile and profilers' counters, and merge pruned weights.

    A pruned layer (torch.nn.utils.prune) has `weight_orig` and `weight_mask`; its weight is their
    product.
    """
    state = {
        key.replace("_orig_mod.", ""): value
        for key, value in state.items()
        if not _COUNTERS.search(key)
    }
    for key in [key for key in state if key.endswith("_orig")]:
        base = key.removesuffix("_orig")
        mask = f"{base}_mask"
        if mask in state and base not in state and state[mask].shape == state[key].shape:
            state[base] = load(state.pop(key)) * load(state.pop(mask))
    return state


def pop_normalize(state: dict[str, Value], path: Path) -> tuple[Mean, Mean] | None:
    """Remove a normalizing submodule's mean and std from `state`; none of our networks has one.

    Rounded to 7 digits: 0.485 was stored as the float32 next to it.
    """
    keys = {part: [k for k in state if k.endswith("." + part)] for part in ("mean", "std")}
    if not keys["mean"] and not keys["std"]:
        return None
    values_of = [[load(state.pop(key)).flatten().tolist() for key in keys[p]] for p in keys]
    if [len(values[0]) if len(values) == 1 else 0 for values in values_of] != [3, 3]:
        raise InputError(
            f"got {path} with {join_few(keys['mean'] + keys['std'])}; expected one mean and one "
            "std of 3 numbers; remove them and state the normalization in the preset"
        )
    mean, std = (tuple(round(number, 7) for number in values[0]) for values in values_of)
    if not (all(0 <= m <= 1 for m in mean) and all(0 < s < math.inf for s in std)):
        raise InputError(
            f"got {path} with mean {mean} and std {std}; expected means on the 0..1 scale and "
            "positive, finite stds; divide them by 255 if they are for 0..255"
        )
    return mean, std


def strip_prefixes(state: dict[str, V]) -> dict[str, V]:
    """Drop the leading names that all keys share (`module.`, `net.`, `1.`).

    No network here has all its weights in one submodule, so a shared name is always a wrapper's.
    """
    while len(state) > 1:
        heads = {key.partition(".")[0] if "." in key else key for key in state}
        if len(heads) > 1 or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def prefixes(state: Mapping[str, V], first: str) -> Iterator[str]:
    """Yield the wrappers' prefixes under which the key `first` of an architecture lies."""
    for key in state:
        if key == first or key.endswith(f".{first}"):
            yield key.removesuffix(first)


HEADS = frozenset({"classifier", "fc", "head", "linear", "last_linear", "logits", "output"})
"""Names of a last layer in networks of others."""


def find_head(
    state: dict[str, V], beside: Mapping[str, V], head: str, known: Collection[str]
) -> tuple[dict[str, V], str]:
    """Name as the head the one layer that stands in its place, such as `classifier` for `fc`.

    It lies behind a dropout (`fc.1`), has another name that heads have, or lies beside the network.
    The first layer of a `Sequential` is none: what follows it is not known.

    Args:
        state: the network's tensors by their keys.
        beside: those of the file that are not in the network's wrapper.
        head: the architecture's name for its last layer.
        known: the architecture's keys.

    Returns:
        `state` with the head under its name, and the layer's name in the file; unchanged with ""
        where there is no such layer.
    """
    if f"{head}.weight" in state:
        return state, ""
    strays = {key: value for key, value in state.items() if key not in known} or beside
    layers = {key.rpartition(".")[0] for key in strays}
    layer = layers.pop() if len(layers) == 1 else ""
    parts = [key.removeprefix(f"{layer}.") for key in strays]
    name, _, place = layer.partition(".")
    named = name == head.partition(".")[0] or name in HEADS
    if not named or place == "0" or sorted(parts) not in (["weight"], ["bias", "weight"]):
        return state, ""
    rest = {key: value for key, value in state.items() if key not in strays}
    return {**rest, **{f"{head}.{part}": strays[f"{layer}.{part}"] for part in parts}}, layer


# ------------------------------------------------------------------- other authors' names

_Rules = tuple[tuple[str, str], ...]

_SHORTCUT: _Rules = (  # the CIFAR ResNet of many repositories
    (r"\.shortcut\.", ".downsample."),
    (r"^((?:.*\.)?)linear\.", r"\1fc."),
)
_RESIDUAL: _Rules = (  # the CIFAR-100 networks of many repositories, as bad teaching and SSD use
    (r"(^|\.)conv1\.0\.", r"\1conv1."),
    (r"(^|\.)conv1\.1\.", r"\1bn1."),
    (r"\.residual_function\.0\.", ".conv1."),
    (r"\.residual_function\.1\.", ".bn1."),
    (r"\.residual_function\.3\.", ".conv2."),
    (r"\.residual_function\.4\.", ".bn2."),
    (r"\.shortcut\.", ".downsample."),
    *((rf"(^|\.)conv{n + 1}_x\.", rf"\1layer{n}.") for n in range(1, 5)),
)
_HUB_RESNET: _Rules = (  # transformers' ResNetForImageClassification
    (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
    (r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^resnet\.encoder\.stages\.{n}\.layers\.", f"layer{n + 1}.") for n in range(4)),
    *((rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)),
    *((rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^classifier\.1\.", "fc."),
)
_TIMM_VIT: _Rules = (  # timm's vision transformers
    (r"(^|\.)cls_token$", r"\1class_token"),
    (r"(^|\.)pos_embed$", r"\1encoder.pos_embedding"),
    (r"(^|\.)patch_embed\.proj\.", r"\1conv_proj."),
    (r"\.norm1\.", ".ln_1."),
    (r"\.norm2\.", ".ln_2."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"(^|\.)blocks\.(\d+)\.", r"\1encoder.layers.encoder_layer_\2."),
    (r"^norm\.|(?<=\.)norm\.", "encoder.ln."),
    (r"^head\.|(?<=\.)head\.", "heads.head."),
)
_HUB_VIT: _Rules = (  # transformers' ViTForImageClassification, of version 4 and of 5
    (r"^vit\.embeddings\.cls_token$", "class_token"),
    (r"^vit\.embeddings\.position_embeddings$", "encoder.pos_embedding"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "conv_proj."),
    (r"^vit\.(?:encoder\.layer|layers)\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".self_attention.\1_"),
    *(
        (rf"\.attention\.{part[0]}_proj\.", f".self_attention.{part}_")
        for part in ("query", "key", "value")
    ),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".self_attention.out_proj."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.0."),
    (r"\.(?:output\.dense|mlp\.fc2)\.", ".mlp.3."),
    (r"\.layernorm_before\.", ".ln_1."),
    (r"\.layernorm_after\.", ".ln_2."),
    (r"^vit\.layernorm\.", "encoder.ln."),
    (r"^classifier\.", "heads.head."),
)
_STAGE = range(4)
_TIMM_CONVNEXT: _Rules = (
    (r"(^|\.)stem\.", r"\1features.0."),
    *((rf"(^|\.)stages\.{n}\.downsample\.", rf"\1features.{2 * n}.") for n in _STAGE),
    *((rf"(^|\.)stages\.{n}\.blocks\.", rf"\1features.{2 * n + 1}.") for n in _STAGE),
    (r"\.gamma$", ".layer_scale"),
    (r"\.conv_dw\.", ".block.0."),
    (r"(features\.\d\.\d+)\.norm\.", r"\1.block.2."),
    (r"\.mlp\.fc1\.", ".block.3."),
    (r"\.mlp\.fc2\.", ".block.5."),
    (r"(^|\.)head\.norm\.", r"\1classifier.0."),
    (r"(^|\.)head\.fc\.", r"\1classifier.2."),
)
_HUB_CONVNEXT: _Rules = (
    (r"^classifier\.", "classifier.2."),
    (r"^convnext\.layernorm\.", "classifier.0."),
    (r"^convnext\.embeddings\.patch_embeddings\.", "features.0.0."),
    (r"^convnext\.embeddings\.layernorm\.", "features.0.1."),
    *(
        (rf"^convnext\.encoder\.stages\.{n}\.downsampling_layer\.", f"features.{2 * n}.")
        for n in _STAGE
    ),
    *((rf"^convnext\.encoder\.stages\.{n}\.layers\.", f"features.{2 * n + 1}.") for n in _STAGE),
    (r"\.layer_scale_parameter$", ".layer_scale"),
    (r"\.dwconv\.", ".block.0."),
    (r"\.layernorm\.", ".block.2."),
    (r"\.pwconv1\.", ".block.3."),
    (r"\.pwconv2\.", ".block.5."),
)
_SWIN: _Rules = (  # its authors', who put a stage's merging at its end
    (r"(^|\.)patch_embed\.proj\.", r"\1features.0.0."),
    (r"(^|\.)patch_embed\.norm\.", r"\1features.0.2."),
    *((rf"(^|\.)layers\.{n}\.downsample\.", rf"\1features.{2 * n + 2}.") for n in _STAGE),
    *((rf"(^|\.)layers\.{n}\.blocks\.", rf"\1features.{2 * n + 1}.") for n in _STAGE),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"(^|\.)head\.fc\.", r"\1head."),
)
_TIMM_SWIN: _Rules = (  # at the start of the next
    *((rf"(^|\.)layers\.{n}\.downsample\.", rf"\1features.{2 * n}.") for n in _STAGE),
    *_SWIN,
)
_HUB_SWIN: _Rules = (  # transformers' SwinForImageClassification, of version 4 and of 5
    (r"^swin\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^swin\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^swin\.encoder\.", ""),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1_"),
    *((rf"\.attention\.{part[0]}_proj\.", f".attn.{part}_") for part in ("query", "key", "value")),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self|relative_position_bias)\.relative", ".attn.relative"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^swin\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    *_SWIN,
)
_AUTHORS: tuple[tuple[Callable[[str], object], _Rules], ...] = (  # a key only they have; the rules
    (re.compile(r"\.residual_function\.").search, _RESIDUAL),
    (re.compile(r"(^|\.)layer\d\.\d\.shortcut\.\d\.").search, _SHORTCUT),
    (re.compile(r"^resnet\.embedder\.").search, _HUB_RESNET),
    (re.compile(r"(?<!\.\d)(^|\.)blocks\.\d+\.attn\.qkv\.").search, _TIMM_VIT),
    (re.compile(r"^vit\.embeddings\.").search, _HUB_VIT),
    (re.compile(r"(^|\.)stages\.\d\.blocks\.\d+\.conv_dw\.").search, _TIMM_CONVNEXT),
    (re.compile(r"^convnext\.embeddings\.").search, _HUB_CONVNEXT),
    (re.compile(r"^swin\.embeddings\.").search, _HUB_SWIN),
    (re.compile(r"(^|\.)layers\.3\.downsample\.reduction\.").search, _TIMM_SWIN),
    (re.compile(r"(^|\.)layers\.\d\.blocks\.\d+\.attn\.qkv\.").search, _SWIN),
)


def restore_names(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the names and shapes of another library, as `translate` would read them.

    Args:
        state: the weights.
        like: the other library's state dict, of any values, on any device.

    Raises:
        InputError: the two networks have other parameters.
    """
    names = list(like)
    # Each of its keys is followed through `translate` by a tensor that holds the key's number.
    numbers: dict[str, Value] = {
        name: torch.full((), float(number)).expand(like[name].shape)
        for number, name in enumerate(names)
    }
    sources = {
        key: names[int(load(value).flatten()[0])] for key, value in translate(numbers).items()
    }
    others = {key for key in state if not key.endswith("relative_position_index")} ^ set(sources)
    if others:
        raise InputError(f"got weights {', '.join(sorted(others)[:3])}, which one network lacks")
    return {name: state[key].reshape(like[name].shape) for key, name in sources.items()}


def translate(state: dict[str, Value]) -> dict[str, Value]:
    """Give other authors' keys of an architecture the names that torchvision gives them.

    The weights are the same; only query, key and value of an attention are put together, and the
    indices that a network computes by itself are dropped.
    """
    rules = next((r for mark, r in _AUTHORS if any(map(mark, state))), None)
    if rules is None:
        return state
    named: dict[str, Value] = {}
    for key, value in state.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        new = key
        for pattern, put in rules:
            new = re.sub(pattern, put, new)
        if new in named:
            return state
        scale = new.endswith(".layer_scale") and value.dim() == 1
        named[new] = load(value).reshape(-1, 1, 1) if scale else value
    for key in [key for key in named if key.endswith((".query_weight", ".query_bias"))]:
        names = [key.replace("query_", f"{part}_") for part in ("query", "key", "value")]
        if all(name in named for name in names):
            whole = torch.cat([load(named.pop(name)) for name in names])
            name = "qkv." if ".attn." in key else "in_proj_"  # Swin's, and the transformer's
            named[key.replace("query_", name)] = whole
    return named
