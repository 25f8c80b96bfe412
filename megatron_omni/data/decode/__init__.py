"""Media files to arrays."""
