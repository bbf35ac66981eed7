"""What the scripts print: their help, how much of all else, and the summary at their end."""
