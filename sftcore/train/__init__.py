"""Training: the engine (DeepSpeed), the loop, checkpoints, export."""
