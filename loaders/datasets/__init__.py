"""Image sets, whatever they were downloaded as: layouts, archives, lists, arrays."""
