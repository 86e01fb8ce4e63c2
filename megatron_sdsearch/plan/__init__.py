"""What a run will need before it is started: memory per GPU, seconds per step, and layouts that do better."""
