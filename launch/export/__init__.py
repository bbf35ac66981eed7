"""A finished model in the forms that other libraries read."""
