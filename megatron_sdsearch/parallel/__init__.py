"""Process groups, the CPU layer for megatron-core, the sharded vocabulary, and the pipeline schedule."""
