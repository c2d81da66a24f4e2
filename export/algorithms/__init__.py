"""What wins accuracy back from INT8: each algorithm in a module, switched on by a recipe."""
