"""The parts of a model that can be traced, where the whole cannot; a record for each BatchNorm."""
