"""Inspects what a user's model holds and does, from its objects and code, without running it."""
