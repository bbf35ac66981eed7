"""Many small models, or many requests, by one command: what it saves, and what it could."""
