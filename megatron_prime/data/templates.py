"""From a question to the text that the model sees.

System prompt and task suffixes are those published with PRIME (README of PRIME-RL/PRIME, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_prime.errors import DataError

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

_ACTIONS = ("ASSESS", "ADVANCE", "VERIFY", "SIMPLIFY", "SYNTHESIZE", "PIVOT", "OUTPUT")
PRIME_SYSTEM_PROMPT = (
    "\nWhen tackling complex reasoning tasks, you have access to the following actions. "
    "Use them as needed to progress through your thought process.\n\n"
    + "".join(f"[{action}]\n\n" for action in _ACTIONS)
    + "You should strictly follow the format below:\n\n[ACTION NAME]\n\n"
    "# Your action step 1\n\n# Your action step 2\n\n# Your action step 3\n\n...\n\nNext action: [NEXT ACTION NAME]\n"
)
TASK_SUFFIXES = {
    "math": "\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
    "code": (
        "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
    ),
}
"""By ability; other abilities get none."""
_RAW = "do without (data.template: raw in a configuration; generate --raw; evaluate --benchmarks ... --template raw)"


def complete_messages(
    messages: Sequence[Message], *, ability: str, system_prompt: Literal["prime", "none"], task_suffix: bool
) -> list[Message]:
    """Adds PRIME's system prompt and task suffix if they are wanted and missing.

    Args:
        messages: a conversation that ends with the user.
        ability: key of `TASK_SUFFIXES`.
        system_prompt: whether to put PRIME's system prompt in front.
        task_suffix: whether to append the suffix of the ability.

    Returns:
        New messages; the arguments stay as they are.
    """
    complete = [dict(message) for message in messages]
    if system_prompt == "prime" and not any(message["role"] == "system" for message in complete):
        complete.insert(0, {"role": "system", "content": PRIME_SYSTEM_PROMPT})
    suffix = TASK_SUFFIXES.get(ability, "")
    last = complete[-1]
    if task_suffix and suffix.strip() not in last["content"]:
        last["content"] += suffix
    return complete


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Literal["chat", "raw"]) -> str:
    """The prompt's text.

    Args:
        tokenizer: brings the chat template.
        messages: from `complete_messages`.
        template: `chat` applies the chat template up to the start of the answer, `raw` joins the contents with
            newlines.

    Returns:
        Text to be tokenized (`chat`: without special tokens, the template has written them).

    Raises:
        DataError: no chat template, or one that refuses the messages.
    """
    if template == "raw":
        return "\n".join(message["content"] for message in messages)
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer has no chat template; {_RAW}")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the messages ({error}); leave out the system prompt (data.system_prompt: none, "
            f"of evaluate --system-prompt none), or {_RAW}"
        ) from error
    return str(text)
