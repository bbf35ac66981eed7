"""Who may write a record, whether it is what it says, and what else holds the data."""
