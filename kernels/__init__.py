"""Pure tensor functions, each specified by its plain PyTorch form. Imports nothing of ours."""
