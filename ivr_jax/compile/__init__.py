"""Ahead-of-time TPU compilation without a TPU: memory, schedule and an estimate of time."""
