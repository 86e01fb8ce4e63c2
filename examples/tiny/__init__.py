"""The demo world: real facts, a tiny model that can learn to search for them on two CPU cores, and its lessons."""
