"""A converted network keeps the classes, attributes and methods of the one that it was made from.

The graph computes with the whole network in view: an activation is part of the site before it, and scale and
shift of a site travel to its consumers. So the code of the user's classes must not run on the converted
modules as if nothing had happened. What a method, or a part on its own, computes is traced from the structure
of the original network, and converted as the graph was, with the same modules: `following`.
"""
