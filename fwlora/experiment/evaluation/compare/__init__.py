"""Records -> runs -> cells -> comparisons: numbers alone."""
