"""How ranks meet, and how each is watched while it works."""
