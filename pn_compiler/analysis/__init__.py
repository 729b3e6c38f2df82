"""The diagnosis of a normalized network."""
