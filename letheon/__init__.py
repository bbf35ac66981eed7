"""Letheon: trained image classifiers forget classes, fast, and what is left is measured."""
