"""What is left after forgetting: accuracy, k-NN transfer, representation similarity."""
