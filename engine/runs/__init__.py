"""A planned run, its folder, and several runs of one call."""
