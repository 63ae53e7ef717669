"""transom."""
