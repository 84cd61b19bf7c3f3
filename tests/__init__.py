"""A package, so that `tests.tolerances` is ours even where another package is called tests."""
