"""Fine-tuning a trained network with small batches, after each way to replace BatchNorm."""
