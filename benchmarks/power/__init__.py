"""The power of the audit: how often each number finds a leak of known size."""
