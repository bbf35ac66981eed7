"""Recipes with where their settings come from, and the search for settings."""
