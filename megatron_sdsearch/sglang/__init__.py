"""SGLang servers for rollouts: one HTTP client, the engine that samples from them, their processes and their weights.

api.py         requests to a server, and what their failures mean
engine.py      the rollout engine over several servers
servers.py     starting, watching and restarting own servers; rules about what a server must offer
guardian.py    the program between trainer and server, which leaves no process behind
serve.py       the GPUs of a node for servers, and the ``serve`` command
publish.py     the steps of a publish, and its attempts
transports.py  three ways for weights: a folder, HTTP, a process group
verify.py      proof that the servers hold the trainer's weights
"""
