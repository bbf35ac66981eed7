"""What a job will read and take before it is started: dry runs and estimates."""
