"""Running a user's model on batches and leaving it as it was; the distance between two outputs."""
