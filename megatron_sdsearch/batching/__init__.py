"""Turns scored groups into packed microbatches."""
