"""What a Python caller hands in, opened and checked before a run starts."""
