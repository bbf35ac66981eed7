"""From disk to `Batch`: image sets, forget requests, streams and the loader backends."""
