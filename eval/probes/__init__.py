"""Probes of the features, and relearning."""
