"""Plain state dicts for other libraries, and ONNX."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from letheon import durable
from letheon.engine.checkpoints.key_names import restore_names
from letheon.engine.models.classifier import Classifier, without_memory
from letheon.engine.models.timm_model import PREFIX, timm_network
from letheon.errors import InputError, RunFailed, install_extra

ENDINGS = {
    "safetensors": (".safetensors",),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".pth", ".pt", ".safetensors"),
    "onnx": (".onnx",),
}
"""Endings of the file of each form."""
TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "vgg16_bn", "convnext_tiny", "swin_t", "vit_b_16",
)  # fmt: skip
"""The networks that torchvision builds under this name."""
TIMM = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "swin_t": "swin_tiny_patch4_window7_224",
    "vit_b_16": "vit_base_patch16_224",
    "vit_tiny_16": "vit_tiny_patch16_224",
}
"""The networks that timm builds too, by its names."""
_RTOL, _ATOL = 1e-3, 1e-4  # of logits, between two libraries' float32 convolutions


def write_state(path: Path, model: Classifier, form: str) -> None:
    """Write the state dict under the keys of `form`, as safetensors or as a torch file."""
    state = plain_state(model)
    if form == "torchvision" and model.name not in TORCHVISION:
        raise InputError(
            f"got {model.name}, which torchvision does not build; expected one of "
            f"{', '.join(TORCHVISION)}; write safetensors",
            option="form",
        )
    if form == "timm":
        state = timm_state(model)[1]
    if path.suffix == ".safetensors":
        durable.write(path, pack(state))
        return
    with durable.replacing(path) as temporary:
        torch.save(state, temporary)


def plain_state(model: Classifier) -> dict[str, Tensor]:
    """Copy the weights to the CPU, under the architecture's own keys."""
    return {k: v.detach().cpu().contiguous() for k, v in model.net.state_dict().items()}


def timm_name(model: Classifier) -> str | None:
    """Name the network of timm that has this architecture; None where timm builds none."""
    if model.name.startswith(PREFIX):
        return model.name.removeprefix(PREFIX)
    return TIMM.get(model.name)


def timm_state(model: Classifier) -> tuple[str, dict[str, Tensor]]:
    """Return timm's name of the network, and the weights under timm's keys.

    Raises:
        InputError: timm builds no such network, or is needed for its keys and is not installed.
    """
    name, state = timm_name(model), plain_state(model)
    if name is None:
        raise InputError(
            f"got {model.name}, which timm does not build; expected {', '.join(TIMM)} or a network "
            "of timm's own; write safetensors",
            option="form",
        )
    if model.name.startswith((PREFIX, "resnet")):  # the same keys
        return name, state
    with without_memory():
        like = timm_network(f"{PREFIX}{name}", model.classes, model.preset.size).state_dict()
    return name, restore_names(state, like)


def pack(state: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file of plain weights, as other libraries write them."""
    from safetensors.torch import save  # here: as in weights_file, whose files say more

    return save(dict(state), metadata={"format": "pt"})


def write_onnx(path: Path, model: Classifier) -> str:
    """Write images (B, 3, size, size), normalized, to logits (B, classes) as ONNX, any B.

    Where onnxruntime is installed the outputs of both are compared on two images of noise.

    Returns:
        one line on what was compared.

    Raises:
        InputError: onnx or onnxscript is not installed.
        RunFailed: onnxruntime's logits are others.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"got form onnx, and {package} is not installed; expected it; "
                f"{install_extra('onnx')}",
                option="form",
            )
    net = model.plain_net().eval().cpu()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, model.preset.size, model.preset.size, generator=generator)
    program = torch.onnx.export(
        net, (images,), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    with durable.replacing(path) as temporary:  # not there where the logits are others
        temporary.write_bytes(program.model_proto.SerializeToString())
        return f"{path}: {_compare_onnx(temporary, net, images)}"


def _compare_onnx(path: Path, net: nn.Module, images: Tensor) -> str:
    """Compare the logits of onnxruntime with the network's, on the CPU."""
    if importlib.util.find_spec("onnxruntime") is None:
        return (
            "warning: outputs not compared, since onnxruntime is not installed; "
            f"{install_extra('onnx')}"
        )
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = net(images)
    difference = float((torch.from_numpy(logits) - expected).abs().max())
    if not torch.allclose(torch.from_numpy(logits), expected, rtol=_RTOL, atol=_ATOL):
        raise RunFailed(
            f"got logits in onnxruntime that differ by {difference:.2g}; expected at most "
            f"{_ATOL} and {_RTOL} of their size; nothing was written; report the network"
        )
    return f"logits in onnxruntime differ by at most {difference:.2g}"
