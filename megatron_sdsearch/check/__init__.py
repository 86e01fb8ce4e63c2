"""Everything about a run that can be known before a GPU is taken: ``python -m megatron_sdsearch check``.

Collects and shows: rules are beside what they are about (``config/rules.py``, ``training/preflight.py``, ...), and
``train`` raises the same list. Found here alone is what training would not notice: waste, and what servers answer.
"""
