"""What saving a run while it goes on costs."""
