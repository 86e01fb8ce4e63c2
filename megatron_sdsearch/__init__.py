"""SD-Search on megatron-core: GRPO for search agents, with self-distillation from hindsight at the query tokens."""

__version__ = "0.1.0"
