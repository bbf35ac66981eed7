"""What a verdict on ten methods and oracles cost by one command."""
