"""The audit of the audit: how often each number accuses a retrained model, and who agrees."""
