"""Memory: what a step keeps between forward and backward, and what ranks share out."""
