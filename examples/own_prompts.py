"""Prompts of your own: products of two numbers, asked for as sums (`3+3+3+3=?` for 3 times 4).

    PYTHONPATH=examples megatron-prime train CONFIG \\
        data.kind=own data.factory=own_prompts:make 'data.options={largest: 9}' data.max_prompt_tokens=64

The base class shuffles each epoch by the run's seed. Every rank makes its own source and a resumed run makes a new one:
prompt number `index` must be the same whenever and wherever it is asked for.
"""

from __future__ import annotations

from megatron_prime import Prompt, PromptRequest, PromptSourceBase


class Products(PromptSourceBase):
    """All products of 1 .. largest; the squares are held out for evaluation."""

    def __init__(self, request: PromptRequest) -> None:
        super().__init__(request)
        numbers = range(1, request.options.get("largest", 9) + 1)
        self._train = [(a, b) for a in numbers for b in numbers if a != b]
        self._held_out = [(a, a) for a in numbers]

    def __len__(self) -> int:
        return len(self._train)

    def prompt(self, index: int) -> Prompt:
        """Number `index` of an epoch, before shuffling."""
        return self._make(*self._train[index])

    def evaluation(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts; leave this out where evaluation.num_prompts is 0."""
        return [self._make(a, b) for a, b in self._held_out[:count]]

    def _make(self, a: int, b: int) -> Prompt:
        # raw_prompt takes the text as it is; chat_prompt adds PRIME's system prompt and the chat template.
        return self.request.raw_prompt(
            f"{'+'.join([str(a)] * b)}=?\n", prompt_id=f"product/{a}/{b}", ground_truth=str(a * b)
        )


def make(request: PromptRequest) -> Products:
    """Called once on every rank; `request` has the tokenizer, the seed and `data.options`."""
    return Products(request)
