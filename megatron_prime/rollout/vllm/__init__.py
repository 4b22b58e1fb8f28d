"""vLLM as a rollout engine, in four arrangements that differ in where its workers run.

vLLM runs behind a wall of processes: the trainer's side never imports it, its own side never imports Megatron. Both
know `wire`, and neither imports the other:

| room | runs in | imports |
|---|---|---|
| `trainer` | the trainer's ranks | torch, `wire` |
| `worker` | vLLM's processes | vLLM, `wire` |
| `wire` | both | torch |

Three files stand above the rooms because they know both sides:

- `engines`: chooses the arrangement (`rollout.engine: vllm`).
- `in_ranks`: engines inside the trainer's ranks, where there is no wall.
- `serve_command`: the command line of a server that a trainer on another host can use.
"""
