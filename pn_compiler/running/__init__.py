"""Running a user's model on batches and leaving it as it was; how far two outputs are apart."""
