"""Whether a prompt source of the user's own gives the same usable prompts to every rank and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_prime.assembly.contracts.trying import raised
from megatron_prime.config import AnyConfig, PrimeConfig
from megatron_prime.config.schema import OwnData
from megatron_prime.errors import PrimeError

if TYPE_CHECKING:
    from megatron_prime.interfaces import PromptSource

_NUM_PROMPTS = 16


def check_own_prompts(config: AnyConfig) -> list[str]:
    """Takes some prompts, in several ways, of two sources; lines as those of `check_sockets`."""
    data = config.data
    if not isinstance(data, OwnData) or not isinstance(config, PrimeConfig):
        return []
    from megatron_prime.data.own import make_own_prompts
    from megatron_prime.data.tokenizer import load_tokenizer

    key = f"data.factory: {data.factory}"
    try:
        tokenizer = load_tokenizer(config.model.path)
        one, other = (make_own_prompts(data, tokenizer, seed=config.run.seed) for _ in range(2))
        return [f"{key}: {problem}" for problem in _problems(config, data, one, other)]
    except PrimeError as error:
        return [str(error)]
    except Exception as error:
        return [raised(key, error)]


def _problems(config: PrimeConfig, data: OwnData, one: PromptSource, other: PromptSource) -> Iterator[str]:
    """What two sources made alike do wrong; every prompt by itself has been looked at when it is taken."""
    count = min(_NUM_PROMPTS, len(one))
    first = one.take(0, count)
    held_out = one.evaluation(min(count, config.evaluation.num_prompts)) if config.evaluation.num_prompts else []
    # Calls in between must not change what comes: a resumed run and an evaluation ask in another order.
    again = [one.take(position, 1)[0] for position in reversed(range(count))][::-1]
    if again != first:
        yield (
            f"take(0, {count}) and take(position, 1) one by one give other prompts; a prompt must depend on its "
            "position alone"
        )
    elif len(one) != len(other) or other.take(0, count) != first:
        yield (
            "two sources made with equal requests give other prompts; take all randomness from the request's seed, "
            "as every rank has a source of its own"
        )
    if held_out and other.evaluation(len(held_out)) != held_out:
        yield "evaluation gives other prompts the second time; they must always be the same"
    # Past the end of an epoch there must be another one.
    one.take(len(one) - 1, 2)
    for what, prompts in (("take", first), ("evaluation", held_out)):
        ids = [prompt.prompt_id for prompt in prompts]
        if repeated := sorted({name for name in ids if ids.count(name) > 1}):
            yield f"{what} gives several prompts of an epoch the prompt_id {repeated[0]!r}; give each its own"
    abilities = sorted({prompt.ability for prompt in [*first, *held_out]} - set(data.abilities))
    if abilities and config.verifier.factory is None:
        yield f"prompts have the ability {abilities[0]!r}, which data.abilities does not name; add it there"
