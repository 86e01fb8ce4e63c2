"""The policy network on megatron-core, its Hugging Face weights, and its checkpoints."""
