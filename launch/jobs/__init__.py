"""Jobs of several scripts: one file that trains, forgets and evaluates; folders of runs."""
