"""Chat templates, and the mapping between token ids and text."""
