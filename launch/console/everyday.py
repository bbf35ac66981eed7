"""What the help of each script shows first, an example of it, and the units of its numbers."""

from __future__ import annotations

from collections.abc import Mapping

FORGETTING = ("weights", "forget", "out", "data", "model")
EVERYDAY: Mapping[str, tuple[str, ...]] = {
    "prepare": ("source", "out", "form", "size", "max_side", "quality", "workers"),
    "train": (
        "out", "data", "model", "epochs", "lr", "batch_size", "seed", "loader", "device",
        "overwrite",
    ),
    "mask": (*FORGETTING, "densities", "seed", "loader", "device", "overwrite"),
    "forget": (*FORGETTING, "recipe", "seed", "loader", "device", "overwrite"),
    "tune": (*FORGETTING, "recipe", "ranges", "trials", "minutes", "seeds"),
    "evaluate": (
        "folder", "original", "retrained", "runs", "forget", "downstream", "depth", "report", "out",
        "data",
    ),
    "oracles": (
        "out", "forget", "count", "originals", "data", "model", "epochs", "lr", "seed", "device",
    ),
}  # fmt: skip
"""Names of at most ten options, in the order they are shown; of other scripts all are."""

EXAMPLES: Mapping[str, str] = {
    "prepare": "--source cifar10.zip --form arrays --size 32 --out data/cifar10",
    "train": "--data data/cifar10 --model resnet20 --epochs 30 --out runs/original",
    "mask": "--weights runs/original --forget class:3,8 --out runs/masks.safetensors",
    "forget": "--weights runs/original --forget class:3,8 --out runs/salun salun random-label",
    "recipes": "--show cifar10-resnet18/salun",
    "tune": "--weights runs/original --forget class:3,8 --out runs/tune random-label",
    "evaluate": "--original runs/original --runs runs/salun --out runs/table --report",
    "oracles": "--data digits --forget class:3,8 --count 20 --out runs/oracles",
    "run": "launch/recipes/digits.toml --out runs/digits",
    "verify": "runs/salun",
    "dispose": "runs/salun",
    "export": "runs/salun --form huggingface --out salun-hub",
    "doctor": "--data /data/imagenet --out runs",
    "methods": "salun",
    "serve": "runs",
    "completion": "bash",
}
"""Arguments of one useful call."""

GROUPS: Mapping[str, str] = {
    "DataOptions": "Images",
    "CacheOptions": "Decoded images that are kept",
    "JobOptions": "Ranks",
    "Precision": "Computing",
    "Forgetting": "Request",
    "CheckpointOptions": "Checkpoints from elsewhere",
    "CanaryOptions": "Canaries",
    "SaveOptions": "Saving and going on",
    "TrackingOptions": "Trackers",
    "Recipe": "Optimization",
    "FromScratch": "Training from new weights",
    "Retrain": "Retraining",
    "Train": "Training",
    "Extent": "How much is measured",
    "Conditions": "Neighbors and likeness of features",
    "Encoding": "How images are kept",
    "JobForecast": "Job that is predicted",
}
"""Title of the options that a dataclass declares; of others the script's own."""
OWN = "Further options"

UNITS: Mapping[str, str] = {
    **dict.fromkeys(("seed", "holdout_seed", "canaries_seed"), "SEED"),
    **dict.fromkeys(("holdout", "share", "raw", "ema", "density", "densities"), "SHARE"),
    **dict.fromkeys(("forget_target", "label_smoothing", "validation_share"), "SHARE"),
    **dict.fromkeys(("size", "sizes", "resize_to", "max_side", "max_pixels"), "PIXELS"),
    **dict.fromkeys(("batch_size", "rank_batch", "block", "whitening_images"), "IMAGES"),
    **dict.fromkeys(("forget_batch_size", "batch_norm_group", "canaries"), "IMAGES"),
    **dict.fromkeys(("epochs", "warmup", "max_epochs"), "EPOCHS"),
    **dict.fromkeys(("relearn", "attacks", "log_every", "noise_steps"), "STEPS"),
    **dict.fromkeys(("trials", "at_once"), "TRIALS"),
    **dict.fromkeys(("count", "originals"), "MODELS"),
    "grow_at": "EPOCH", "grad_accum_steps": "PARTS", "lr": "RATE", "ks": "NEIGHBORS",
    "workers": "PROCESSES", "dry_run": "RANKS", "nodes": "NODES", "timeout": "SECONDS",
    "minutes": "MINUTES", "dali_cache": "GIB", "page": "BYTES", "bandwidth": "GB/S",
    "quality": "1..100", "port": "NUMBER",
    **dict.fromkeys(("forget", "canaries_among", "related"), "REQUEST"),
    **dict.fromkeys(("data", "downstream", "source"), "SET"),
    **dict.fromkeys(("model", "part", "recipe", "show"), "NAME"),
    "save_every": "INTERVAL", "classes": "PATH", "ranges": "RANGES", "seeds": "SEEDS",
    "key": "HEX", "address": "ADDRESS",
}  # fmt: skip
"""What the number of an option counts, or its text is, by its name; pure factors have none."""
