"""What operators are: their names in a graph, activations as functions, and their exact pieces."""
