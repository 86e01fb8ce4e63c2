"""Builds the hindsight block, which only the teacher sees: the searches of all siblings and their outcomes."""
