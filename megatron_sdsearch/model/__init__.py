"""The megatron-core policy network, its Hugging Face weights, and its checkpoints."""
