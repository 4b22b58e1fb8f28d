"""Whether a verifier of the user's own takes any answer."""

from __future__ import annotations

from megatron_prime.assembly.contracts.trying import raised, some
from megatron_prime.config import AnyConfig, PrimeConfig
from megatron_prime.errors import PrimeError

_NUM_PROMPTS = 2
_FIX = (
    "; submit must return a concurrent.futures.Future of a megatron_prime.Verdict for every text, the same one for "
    "equal texts, with a reward from 0 to 1 or None"
)


def check_own_verifier(config: AnyConfig) -> list[str]:
    """Lets it judge odd answers to some of the run's prompts, twice; lines as those of `check_sockets`."""
    if not isinstance(config, PrimeConfig) or config.verifier.factory is None:
        return []
    # Torch and a tokenizer, which a configuration without a verifier of its own does without.
    from megatron_prime.data.sources import example_prompts
    from megatron_prime.data.tokenizer import load_tokenizer
    from megatron_prime.verify.contract import odd_answer_problems
    from megatron_prime.verify.plugin import make_own_verifier

    try:
        prompts = example_prompts(config.data, load_tokenizer(config.model.path), count=_NUM_PROMPTS)
    except Exception:
        # What is wrong with the data is found and said where they are read.
        return []
    key = f"verifier.factory: {config.verifier.factory}"
    try:
        problems = odd_answer_problems(make_own_verifier(config.verifier), prompts)
    except PrimeError as error:
        return [f"{error}{_FIX}"]
    except Exception as error:
        return [raised(key, error)]
    return some(key, problems, _FIX)
