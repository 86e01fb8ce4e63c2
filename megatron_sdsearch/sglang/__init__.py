"""SGLang servers for rollouts: one HTTP client, the engine that samples from them, their processes and their weights.

api.py         requests to servers and the meaning of their failures
rules.py       what a run requires of its servers
engine.py      the rollout engine over several servers
servers.py     starts, watches and restarts the run's own servers
guardian.py    wrapper process of one server: kills its whole process tree
serve.py       the ``serve`` command, and the GPUs of a node for servers
transports.py  weight transports: a folder, HTTP, a process group
publish.py     publishes weights: steps, attempts, verification
"""
