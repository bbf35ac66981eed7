"""The numbers of a pass on the device: sums, counts, and those that are not finite."""
