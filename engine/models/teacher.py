"""Teacher of distillation: a frozen copy of a network with batch-norm folded in."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.models.classifier import Classifier, Head, Output
from letheon.engine.precision import Precision


def frozen_copy(model: Classifier, precision: Precision) -> Classifier:
    """Copy the model in evaluation mode, its batch-norms folded into the convolutions before them.

    Equal to the model to rounding: a folded batch-norm is the same affine map in another order.
    Under bf16 or fp16 the weights of convolutions and linear layers are kept in that type, which is
    what autocast would make of them at every step; such a teacher must be called under autocast. A
    network that cannot be traced, or has nothing to fold, stays as it is, and so do batch-norms
    after convolutions of a network's own kind.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.net = fold_batch_norms(teacher.net).eval().requires_grad_(False)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.dtype)
    if kind is not None:
        for module in teacher.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(kind)
    if precision.channels_last:
        teacher.to(memory_format=torch.channels_last)
    return teacher


Teachers = WeakValueDictionary[tuple[object, ...], Classifier]
"""Frozen copies that the runs of one call share, by their weights; each lives as long as a run
holds it. Never wider than a call: equal weights in another network, such as one with a hook or
another activation, answer otherwise."""

_last: WeakKeyDictionary[Classifier, tuple[ref[Tensor], int, Output]] = WeakKeyDictionary()


def shared_copy(model: Classifier, precision: Precision, teachers: Teachers) -> Classifier:
    """Make a `frozen_copy`, or share the one of these weights that is among `teachers`."""
    device = next(model.parameters()).device
    key = (weights_digest(model), model.name, precision.dtype, precision.channels_last, device)
    teacher = teachers.get(key)
    if teacher is None:
        teacher = teachers[key] = frozen_copy(model, precision)
    return teacher


def teacher_output(teacher: Classifier, images: Tensor) -> Output:
    """Compute the teacher's logits (B, C) and pooled features (B, D), without a gradient.

    The output of the last batch is remembered for the next of several runs that are fed in one
    pass. (Every batch of a loader is a new tensor.) In a compiled graph it always computes.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return _answer(teacher, images)
    if teacher in _last:
        seen, version, answer = _last[teacher]
        if seen() is images and version == images._version:
            return answer
    with torch.no_grad():
        answer = _answer(teacher, images)
    _last[teacher] = (ref(images), images._version, answer)
    return answer


def teacher_features(teacher: Classifier, images: Tensor) -> Tensor:
    """Compute the teacher's pooled features (B, D), as `teacher_output`."""
    return teacher_output(teacher, images).features


def _answer(teacher: Classifier, images: Tensor) -> Output:
    answer: Output = teacher(images)
    return answer


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers are not looked into, a network's own kinds of convolution and head included."""
        own = isinstance(m, (Head, nn.Conv2d))
        return own or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Fold the batch-norms of `net`, in evaluation mode, in place where that can be done."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return net
    try:
        graph = _Tracer().trace(net)
    except Exception:  # whatever a network's own code raises on a symbol in place of its input
        return net
    calls: Counter[Any] = Counter(node.target for node in graph.nodes)
    for node in list(graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or len(before.users) > 1:
            continue  # another reader of the convolution must not see it folded
        if calls[node.target] > 1 or calls[before.target] > 1:
            continue  # a shared layer has other neighbours at its other call
        norm = net.get_submodule(str(node.target))
        conv = net.get_submodule(str(before.target))
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and _fold(conv, norm):
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    return fx.GraphModule(net, graph)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return False
    if type(conv).forward is not nn.Conv2d.forward:
        return False  # a kind of its own may pass its bias by
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    return True
