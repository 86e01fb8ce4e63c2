"""Chat templates, and the map between token ids and characters."""
