"""The passes over the data that a run is made of."""
