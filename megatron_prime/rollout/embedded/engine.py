"""The embedded engine: a transformers model in every process, no further installation, any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megatron_prime import collectives
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import EngineSetup, OnAnswer
from megatron_prime.rollout.embedded.kv_cache import ATTENTION_NAME
from megatron_prime.rollout.embedded.sampling import Request, Sample, sample
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.randomness import answer_key
from megatron_prime.weights.checksum import WeightChecksum


class TransformersEngine:
    """Engine (`interfaces.Engine`) that holds the whole model in every process and shares out the prompts.

    Args:
        folder: Hugging Face folder; only its ``config.json`` is read, weights come by `load_weights`.
        dtype: of parameters and activations.
        device: where the model lives.
        end_token_ids: tokens that end an answer, besides ``SamplingParams.stop_token_ids``.
        decode: tokens of an answer (without the token that ended it) to text.
        max_batch_size: answers that this process samples at the same time.

    Raises:
        RolloutError: the folder's config.json is missing, unreadable or of a model that cannot be sampled from.
    """

    weight_version: int

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        end_token_ids: tuple[int, ...],
        decode: Callable[[Sequence[int]], str],
        max_batch_size: int,
    ) -> None:
        self.weight_version = -1
        self._device = torch.device(device)
        self._end_token_ids = end_token_ids
        self._decode = decode
        self._max_batch_size = max_batch_size
        self._unusable: str | None = "no weights were loaded yet; call load_weights first"
        self._asleep = False
        self._model: PreTrainedModel | None = _build_model(Path(folder), dtype, self._device)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """See `interfaces.Engine.generate`; a prompt's answers are all sampled by the same rank."""
        model = self._open_model()
        if self._unusable is not None:
            raise RolloutError(f"the rollout engine cannot generate: {self._unusable}")
        if self._asleep:
            raise RolloutError("the rollout engine cannot generate: it sleeps; call wake first")
        check_prompts(
            prompts,
            sampling.max_response_tokens,
            max_length=model.config.max_position_embeddings,
            vocab_size=model.config.vocab_size,
        )
        count = sampling.num_responses
        places = [(prompt, answer) for prompt in collectives.my_share(range(len(prompts))) for answer in range(count)]
        requests = [
            Request(prompt=prompts[i].token_ids, key=answer_key(sampling.seed, prompts[i].prompt_id, answer))
            for i, answer in places
        ]
        responses: dict[int, Response] = {}

        def take(request: int, answer: Sample) -> None:
            responses[request] = self._response(answer)
            if on_answer is not None:
                on_answer(*places[request], responses[request])

        sample(
            model,
            requests,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_response_tokens,
            stop_token_ids=(*self._end_token_ids, *sampling.stop_token_ids),
            max_rows=self._max_batch_size,
            on_ended=take,
        )
        groups = [[responses[start + i] for i in range(count)] for start in range(0, len(responses), count)]
        return collectives.interleave(collectives.all_gather(groups))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """See `interfaces.Engine.load_weights`; a tied output layer may be left out of the stream."""
        model = self._open_model()
        self.weight_version = -1
        self._unusable = f"loading weights of version {version} failed; load a complete set"
        sent = WeightChecksum(self._device)
        problems = _copy_weights(model, weights, sent)
        if problems:
            raise RolloutError("\n".join(f"weights of version {version}: {problem}" for problem in problems))
        checksum = WeightChecksum(self._device)
        for name, parameter in _published_parameters(model).items():
            checksum.update(name, parameter)
        if checksum.hexdigest() != sent.hexdigest():
            raise RolloutError(
                f"weights of version {version}: the engine holds {checksum.hexdigest()}, "
                f"{sent.hexdigest()} was sent; nothing will be sampled from them"
            )
        self._unusable = None
        self.weight_version = version
        return checksum.hexdigest()

    def sleep(self) -> None:
        """Moves the weights to host memory; the key-value cache lives only inside `generate`."""
        torch.nn.Module.to(self._open_model(), "cpu")
        self._asleep = True

    def wake(self) -> None:
        """Moves the weights back to the device."""
        torch.nn.Module.to(self._open_model(), self._device)
        self._asleep = False

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        self.weight_version = -1

    def _open_model(self) -> PreTrainedModel:
        if self._model is None:
            raise RolloutError("the rollout engine was closed; build a new one")
        return self._model

    def _response(self, answer: Sample) -> Response:
        text_ids = answer.token_ids[:-1] if answer.stopped else answer.token_ids
        return Response(
            text=self._decode(text_ids),
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason="stop" if answer.stopped else "length",
            weight_version=self.weight_version,
        )


def make_engine(setup: EngineSetup) -> TransformersEngine:
    """The engine of `rollout.engine: transformers`, without weights."""
    return TransformersEngine(
        setup.folder,
        dtype=getattr(torch, setup.dtype),
        device=setup.place.device,
        end_token_ids=setup.end_token_ids,
        decode=setup.decode,
        max_batch_size=setup.section.max_batch_size,
    )


def _build_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a folder's config.json, its parameters uninitialised."""
    if not (folder / "config.json").is_file():
        raise RolloutError(f"{folder / 'config.json'}: not found; give a Hugging Face model folder as model.path")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        # Values would be overwritten anyway, and drawing them would advance torch's global generator.
        with no_init_weights(), torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except (ValueError, OSError, KeyError) as error:
        raise RolloutError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise RolloutError(
            f"{folder / 'config.json'}: only full attention is supported; set use_sliding_window to false"
        )
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _published_parameters(model: PreTrainedModel, *, remove_duplicate: bool = True) -> dict[str, torch.Tensor]:
    """Parameters (views, not copies) under the names of published models, which have every expert by itself.

    transformers keeps the experts of a layer stacked, gate and up projection in one matrix.
    """
    result: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".mlp.experts"):
            result[name] = parameter.detach()
            continue
        for number, expert in enumerate(parameter.detach()):
            parts = {kind: expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            result |= {f"{prefix}.{number}.{part}.weight": values for part, values in parts.items()}
    return result


@torch.no_grad()
def _copy_weights(
    model: PreTrainedModel, stream: Iterable[tuple[str, torch.Tensor]], sent: WeightChecksum
) -> list[str]:
    """Copies a stream into the parameters of the same names and returns every problem found.

    Adds what was sent, in the model's dtype, to a checksum.

    The stream is read to its end whatever happens: producing it may be a collective of all ranks.
    """
    parameters = _published_parameters(model, remove_duplicate=False)
    required = _published_parameters(model).keys()
    received: set[str] = set()
    tied: list[tuple[str, torch.Tensor]] = []
    problems: list[str] = []
    for name, tensor in stream:
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
        elif name in received:
            problems.append(f"{name}: received more than once")
        elif tensor.shape != parameters[name].shape:
            shapes = f"received {list(tensor.shape)}, the model has {list(parameters[name].shape)}"
            problems.append(f"{name}: {shapes}")
        elif name in required:
            parameters[name].copy_(tensor)
            sent.update(name, tensor.to(parameters[name]))
        else:
            tied.append((name, tensor.to(parameters[name], copy=True)))
        received.add(name)
    problems += [f"{name}: missing" for name in sorted(required - received)]
    problems += [
        f"{name}: holds values that are not finite"
        for name in sorted(required & received)
        if not problems and not bool(parameters[name].isfinite().all())
    ]
    problems += [
        f"{name}: differs from the parameter that the model's config.json ties it to"
        for name, tensor in tied
        if not problems and not torch.equal(tensor, parameters[name])
    ]
    return problems
