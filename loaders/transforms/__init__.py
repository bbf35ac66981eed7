"""Geometry, augmentation and the test transform."""
