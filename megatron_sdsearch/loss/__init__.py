"""Vocab-parallel losses: torch only, no megatron."""
