"""The loop, the contract of a method, and what both stand on: models, ranks, records."""
