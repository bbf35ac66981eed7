"""The Triton kernels without a GPU: run by the interpreter, and compiled for three generations."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

F32 = "*fp32"
STEP = {
    "param": F32, "grad": F32, "buffer": F32, "mask": "*u8", "lr": F32, "skip": F32, "n": "i32",
    "momentum": "fp32", "decay": "fp32",
}  # fmt: skip
RESIZE = {
    "images": "*u8", "boxes": F32, "source": "*i64", "flip": "*u8", "out": F32,
    "height": "i32", "width": "i32", "size": "i32",
    **{f"{name}{c}": "fp32" for name in ("scale", "offset") for c in range(3)},
}  # fmt: skip


def test_interpreted_kernels_equal_the_plain_forms():
    tests = Path(__file__).with_name("interpreted.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--import-mode=importlib", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def variants():
    for bits, rate in itertools.product((False, True), (False, True)):
        flags = {"MOMENTUM": True, "BITS": bits, "LR_TENSOR": rate, "SKIP": True, "BLOCK": 1024}
        kinds = STEP | ({} if rate else {"lr": "fp32"})
        yield f"step-{bits}-{rate}", "masked_sgd_triton", "step_kernel", kinds, flags
    for box in (False, True):
        flags = {"BOX": box, "BLOCK": 256}
        yield f"resize-{box}", "augment_triton", "resize_kernel", RESIZE, flags


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability, monkeypatch, tmp_path):
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, module, kernel, signature, flags in variants():
        function = getattr(import_module(f"letheon.kernels.{module}"), kernel)
        types = signature | dict.fromkeys(flags, "constexpr")
        source = ASTSource(fn=function, signature=types, constexprs=flags)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], name
        assert f".target sm_{capability}" in compiled.asm["ptx"], name
