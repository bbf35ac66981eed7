"""The folders of this checkout under one name: ./engine is imported as letheon.engine."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("engine", "eval", "kernels", "launch", "loaders", "methods")
KINDS = ("txt", "json", "html", "css", "js", "toml")
"""Endings of the files that are installed beside the code."""
PACKAGES = [
    found
    for folder in FOLDERS
    for found in (folder, *(f"{folder}.{room}" for room in find_packages(folder)))
]


def version() -> str:
    """Read the version from letheon/__init__.py, which holds it, without importing anything."""
    source = Path(__file__).with_name("letheon") / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f"got no __version__ in {source}")


setup(
    name="letheon",
    version=version(),
    description="Make trained image classifiers forget classes, fast, and measure what is left.",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["letheon", *(f"letheon.{package}" for package in PACKAGES)],
    package_dir={"letheon": "letheon", **{f"letheon.{folder}": folder for folder in FOLDERS}},
    package_data={"": ["py.typed", *(f"**/*.{kind}" for kind in KINDS)]},
    entry_points={"console_scripts": ["letheon = letheon.launch.main:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=2.0",
        "scikit-learn>=1.5",
        "pillow>=11",
        "safetensors>=0.5",
        "tyro>=1.0",
        "jinja2>=3.1",
    ],
    extras_require={
        "ffcv": ["ffcv>=1.0.2; python_version < '3.12'"],
        "dali": ["nvidia-dali-cuda130>=2.4"],
        "fast": ["simplejpeg>=1.9"],
        # Its module has the name of PyTurboJPEG's and hides it; we import neither.
        "turbojpeg": ["turbojpeg>=0.0.2"],
        "faiss": ["faiss-cpu>=1.9"],
        "faiss-gpu": ["faiss-gpu>=1.15"],
        "sign": ["cryptography>=42"],
        "hub": ["pyarrow>=15"],
        "timm": ["timm>=1.0"],
        "tune": ["optuna>=4.0"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.20"],
        "trackio": ["trackio>=0.2"],
        "report": ["matplotlib>=3.10"],
        "pandas": ["pandas>=2.2"],
        # Material is maintained until May 2027; its successor, Zensical, reads the same mkdocs.yml.
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "dev": [
            "pyyaml>=6",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "build>=1.2",
            "jsonschema>=4.20",
            "matplotlib>=3.10",
        ],
    },
)
