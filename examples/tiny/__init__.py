"""The demo: a world of real facts, and a tiny model that learns to search for them on two CPU cores."""
