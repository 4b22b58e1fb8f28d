"""Process rewards of your own: a rule that reads the text of each answer, step by step.

    PYTHONPATH=examples megatron-prime train CONFIG advantage.process_source=own_process_rewards:wrong_sums

A judge or another model goes into the same place. No PRM is trained then; outcomes and these rewards are mixed as
`advantage.*` says, and the gate closes where the rewards do not tell right answers from wrong ones.
"""

from __future__ import annotations

import re

from megatron_prime import ProcessInputs, StepReward


def wrong_sums(inputs: ProcessInputs) -> list[list[StepReward]]:
    """Takes 1 for each `a+b=c;` or `a-b=c;` that is wrong; characters are tokens in the arithmetic task."""
    rows: list[list[StepReward]] = []
    for group in inputs.groups:
        for response in group.responses:
            steps = re.finditer(r"(\d+)([+-])(\d+)=(-?\d+);", response.text)
            rows.append([_judged(step) for step in steps if step.end() <= len(response.token_ids)])
    return rows


def _judged(step: re.Match[str]) -> StepReward:
    left, sign, right, result = step.groups()
    truth = int(left) + int(right) if sign == "+" else int(left) - int(right)
    return StepReward(start=step.start(), stop=step.end(), reward=0.0 if truth == int(result) else -1.0)
