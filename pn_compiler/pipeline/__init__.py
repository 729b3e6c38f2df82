"""A conversion step by step: prepare, compare with the model, convert, measure; and folding."""
