"""Claims, and what the runs say of them."""
