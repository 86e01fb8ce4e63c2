"""Plan a run before it starts: memory per GPU, seconds per step, and better layouts."""
