"""Proxy statistics become constants, which sink into the layers around them. Eval only."""
