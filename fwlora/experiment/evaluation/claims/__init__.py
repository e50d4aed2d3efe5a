"""Claims: files, measures, and verdicts on them."""
