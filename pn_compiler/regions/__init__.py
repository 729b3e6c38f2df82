"""The traceable parts of a model that cannot be traced as a whole, and a record for each BatchNorm."""
