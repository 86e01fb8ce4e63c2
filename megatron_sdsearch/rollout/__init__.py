"""Samples trajectories: engines, episodes, groups."""
