"""Memory of a step: what it keeps between forward and backward."""
