"""Everything about a run that can be known before a GPU is taken: ``python -m megatron_sdsearch check``.

Rules live with what they are about (``config``, ``model/hf_config``, ``retrieval``...), where training stops at the
first one that is broken; here all of them are listed. What is checked here alone is what training would not notice.
"""
