"""What each method's step asks of a GPU, counted without one."""
