"""The training loop, the contract a method fulfils, and what both stand on: models, ranks, precision, records."""
