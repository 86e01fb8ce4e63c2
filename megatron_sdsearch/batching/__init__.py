"""Turns scored groups into advantages, training samples and packed microbatches."""
