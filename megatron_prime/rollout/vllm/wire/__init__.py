"""What both sides of the process wall know: runs in the trainer's ranks and in vLLM's processes.

- `messages`: what trainer and engine process say to each other.
- `shared_memory`: the plan of a set of weights, and a whole set in memory that both map.
- `buckets`: a set of weights as a stream of bytes in two buckets, over a `Channel`.
- `ipc`, `broadcast`: the two channels, on one host and over the network.
"""
