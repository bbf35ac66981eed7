"""Prepared sets: arrays and .beton files, written and read."""
