"""Constants in the place of instance statistics, in part (anchors) or altogether, within a budget."""
