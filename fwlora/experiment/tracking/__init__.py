"""What is recorded of a run, and where it goes."""
