"""Showing image sets to models: features, logits, layers, and their cache."""
