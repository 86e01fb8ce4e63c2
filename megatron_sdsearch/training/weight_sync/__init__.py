"""Publishing the policy's weights: after it, the rollout engine samples from exactly that version.

fleet.py         the servers as the trainer's synchronous code sees them
buckets.py       streams of tensors cut to size
disk.py          strategy: a safetensors folder
tensor.py        strategy: buckets through HTTP
distributed.py   strategy: a process group of trainer and servers
verify.py        proof that the servers hold what the trainer holds
memory.py        what colocated servers give up and take back
publisher.py     the order of it all: pause, send, verify, continue
"""
