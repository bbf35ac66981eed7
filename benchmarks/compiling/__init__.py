"""What compiling costs before the first step, and what the steps after it take."""
