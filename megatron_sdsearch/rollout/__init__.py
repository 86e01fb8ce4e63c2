"""Sampling trajectories: engines, one episode, groups of them."""
