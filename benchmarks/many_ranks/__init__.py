"""What a training asks of each of its ranks, as they grow."""
