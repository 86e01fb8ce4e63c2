"""Vocabulary-parallel losses. They need torch, not megatron-core."""
