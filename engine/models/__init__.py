"""The classifiers by name, and the wrapper that gives logits and features."""
