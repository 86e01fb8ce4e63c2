"""SGLang servers for rollouts: one HTTP client, the engine that samples from them, their processes and their weights.

api.py         requests to servers, and what their failures mean
rules.py       what a run needs of its servers
engine.py      the rollout engine over several servers
servers.py     starting, watching and restarting own servers
guardian.py    the program between trainer and server, which leaves no process behind
serve.py       the GPUs of a node for servers, and the ``serve`` command
transports.py  three ways for weights: a folder, HTTP, a process group
publish.py     the steps of a publish, its attempts, and proof of what servers hold
"""
