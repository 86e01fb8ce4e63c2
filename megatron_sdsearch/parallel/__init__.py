"""Process groups, the CPU layer of megatron-core, the sharded vocabulary, and the pipeline schedule."""
