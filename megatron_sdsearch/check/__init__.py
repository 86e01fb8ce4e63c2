"""Find problems of a run before a GPU is taken: ``python -m megatron_sdsearch check``.

Errors come from rules elsewhere (``config/rules.py``, ``training/preflight.py``, ...), which ``train`` raises as well.
This package adds problems that training would not notice, such as waste, and requests to servers.
"""
