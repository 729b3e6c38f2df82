"""Getting back what a conversion costs: calibration, distillation, static statistics, checkpoints."""
