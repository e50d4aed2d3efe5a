"""Data: tasks, columns, tokens, batches."""
