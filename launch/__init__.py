"""The scripts: prepare, train, mask, forget, evaluate."""
