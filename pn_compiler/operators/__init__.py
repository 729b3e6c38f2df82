"""What operators are: their names in a graph, their traits, and activations as functions and exact pieces."""
