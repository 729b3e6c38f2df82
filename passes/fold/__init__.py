"""Turns proxy statistics into constants and folds them into the layers around them. Eval only."""
