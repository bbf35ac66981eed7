"""Tables of the documents, from the results."""
