"""Checkpoints: weights on disk, read, matched with a model and written."""
