"""The training engine: it knows batches, a model, a method and its own state."""
