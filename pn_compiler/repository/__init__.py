"""A compiled model as a version in a model repository: configurations, golden outputs, templates."""
