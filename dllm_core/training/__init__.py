"""Training: the loop, the optimiser, checkpoints, meters and budgets. It knows only the protocol of a room."""
