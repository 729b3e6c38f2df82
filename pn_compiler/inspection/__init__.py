"""What a user's model holds and does, read from its objects and its code without running it."""
