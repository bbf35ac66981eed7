"""The parts of bench_end_to_end.py: the images, the two sides as processes, ours with its spans."""
