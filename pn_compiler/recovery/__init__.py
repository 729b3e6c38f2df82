"""Getting back the accuracy that a conversion costs: calibration, distillation, checkpoints."""
