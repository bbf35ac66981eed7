"""Weights on disk: reading, matching and writing."""
