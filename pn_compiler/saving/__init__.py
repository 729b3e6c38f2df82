"""A converted network as a file of data: its architecture, the options of its conversion, and its weights.

Loading builds the architecture and converts it again, which needs no values, then fills in the tensors. So a
file holds nothing that would have to be run, neither the code of a graph nor pickled functions.
"""
