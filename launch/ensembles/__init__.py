"""Ensembles of reference models: retrained and original ones, with stored outputs."""
