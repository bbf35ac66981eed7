"""What the scripts print: how much of it, and the summary at their end."""
