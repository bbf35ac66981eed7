"""Attacks that bring back what a model was made to forget; each runs the network."""
