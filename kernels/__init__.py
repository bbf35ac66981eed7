"""Pure tensor functions: each has a plain PyTorch form that is its specification. Imports nothing of ours."""
