"""A local page of the runs in folders: what was found, how it is shown, who may ask."""
