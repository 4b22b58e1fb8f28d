"""A model in its role: scoring whole batches, and (`TrainableRole`) one optimizer step at a time.

Whole-batch CPU tensors come in and go out; sharding over data-parallel ranks, packing and Megatron's
pipeline schedule happen inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_prime import collectives
from megatron_prime.config.schema import OptimizerSection
from megatron_prime.errors import NonFiniteError, TrainingError
from megatron_prime.mcore.cpu import megatron_platform, on_megatron_platform
from megatron_prime.mcore.losses import TokenLoss
from megatron_prime.mcore.packing import (
    MicroBatch,
    TokenRows,
    build_micro_batch,
    cut_micro_batches,
    sequence_multiple,
    shard_rows,
)
from megatron_prime.mcore.reports import ReportingLoss, combined, reduce_metrics
from megatron_prime.mcore.residency import Residency
from megatron_prime.mcore.role_setup import RoleSetup, StepResult
from megatron_prime.mcore.skipped_steps import SkippedSteps
from megatron_prime.weights.families import WeightSpec, weight_specs
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.stream import WeightExport, import_weights


class ModelRole:
    """One model of the run on this rank, with random weights until `load_hf`."""

    def __init__(self, setup: RoleSetup) -> None:
        self.setup = setup
        self.layout = setup.layout
        self.imbalance = 1.0
        """Tokens of the fullest data-parallel rank over their mean, at the latest pass."""
        self.architecture = setup.architecture
        self.residency = Residency(setup.parallel.offload_idle)
        self.sequence_multiple = sequence_multiple(setup.model, setup.parallel)
        self.padded_vocab_size = setup.architecture.padded_vocab_size(
            setup.model.make_vocab_size_divisible_by, setup.layout.tp_size
        )
        with megatron_platform():
            from megatron.core.transformer.module import Float16Module

            from megatron_prime.mcore.libraries import choose_libraries
            from megatron_prime.mcore.model import build_chunks

            self.transformer_engine = choose_libraries(setup.model, packed=setup.micro_batch.packed).transformer_engine
            self.chunks = build_chunks(
                setup.architecture,
                setup.model,
                setup.parallel,
                transformer_engine=self.transformer_engine,
                head_options=setup.head,
                device=setup.layout.device,
            )
            self.config = self.chunks[0].config
            self.modules: list[Any] = [
                Float16Module(self.config, chunk) if self.config.bf16 else chunk for chunk in self.chunks
            ]
        self.specs: list[WeightSpec] = weight_specs(setup.architecture)
        self._export = WeightExport(self.specs, setup.architecture, self._awake_weights, setup.layout.export_groups())

    def local_weights(self) -> dict[str, torch.Tensor]:
        """This rank's parameters under their global Megatron names (views, not copies)."""
        result: dict[str, torch.Tensor] = {}
        for chunk in self.chunks:
            result |= self._weights_of(chunk)
        return result

    def _weights_of(self, chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
        by_local_name = dict(chunk.named_parameters())
        layers: Any = chunk.decoder.layers  # pyright: ignore[reportAttributeAccessIssue]
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        experts = self.architecture.experts
        first_expert = self.layout.ep_rank * experts.num_experts // self.layout.ep_size if experts else 0
        result: dict[str, torch.Tensor] = {}
        for spec in self.specs:
            name = spec.transformer_engine_name if self.transformer_engine else spec.megatron_name
            if spec.layer is not None:
                name = name.replace(f"layers.{spec.layer}.", f"layers.{spec.layer - first_layer}.", 1)
            if spec.expert is not None:
                name = name.replace(f"experts.{spec.expert}.", f"experts.{spec.expert - first_expert}.", 1)
            parameter = by_local_name.pop(name, None)
            if parameter is not None:
                result[spec.megatron_name] = parameter.data
        # The last stage's copy of a tied embedding is Megatron's own and is refreshed by `sync_tied_copy`.
        assert set(by_local_name) <= {"output_layer.weight"}, f"parameters without a map: {sorted(by_local_name)}"
        return result

    def load_hf(self, folder: HfFolder) -> None:
        """Reads this rank's slices of a validated Hugging Face folder."""
        import_weights(
            self.specs,
            self.architecture,
            folder,
            self.local_weights(),
            tp_rank=self.layout.tp_rank,
            tp_size=self.layout.tp_size,
            padded_vocab_size=self.padded_vocab_size,
        )
        self.sync_tied_copy()

    def sync_tied_copy(self) -> None:
        """Gives the last stage the first stage's embedding, where a tied head makes both hold it."""
        if not self.architecture.tied_embeddings or self.layout.pp_size == 1:
            return
        with megatron_platform():
            from megatron.core import parallel_state as megatron_state

            parallel_state: Any = megatron_state
            if parallel_state.is_rank_in_embedding_group():
                (chunk,) = (chunk for chunk in self.chunks if chunk.pre_process or chunk.post_process)
                weight = chunk.shared_embedding_or_output_weight().data
                source = parallel_state.get_pipeline_model_parallel_first_rank()
                torch.distributed.broadcast(weight, src=source, group=parallel_state.get_embedding_group())

    def sleep(self) -> None:
        """Offloads memory until `wake`, as `parallel.offload_idle` says."""
        self.residency.sleep(self.chunks)

    def wake(self, *, training: bool = False) -> None:
        """Brings back the weights, and for training gradients and optimizer states."""
        self.residency.wake(training=training)

    def export_weights(self) -> WeightExport:
        """The weights for an engine or a folder; every rank must take part in reading them."""
        return self._export

    def _awake_weights(self) -> dict[str, torch.Tensor]:
        """Returns `local_weights`, waking the model if it sleeps: a lost engine may need them again at any time."""
        self.wake()
        return self.local_weights()

    def _micro_batches(self, rows: TokenRows, selected: Sequence[int]) -> list[MicroBatch]:
        lengths = rows.input_lengths()
        shards = shard_rows(lengths, selected, self.layout.dp_size)
        loads = [sum(lengths[row] for row in shard) for shard in shards]
        self.imbalance = max(loads) * len(loads) / max(sum(loads), 1)
        # Every rank checks all shards, not only its own: a rank that raised alone would leave the others in a hang.
        if not all(shards):
            raise TrainingError(
                f"{len(selected)} responses cannot be shared by {self.layout.dp_size} data-parallel ranks; "
                "raise rollout.num_prompts or lower the number of mini-batches"
            )
        section = self.setup.micro_batch
        limits = {"micro_batch_size": section.micro_batch_size, "micro_batch_tokens": section.micro_batch_tokens}
        cuts = [cut_micro_batches(lengths, shard, **limits) for shard in shards]
        mine = cuts[self.layout.dp_rank]
        # Data-parallel ranks that share experts exchange tokens in each layer: they need equally many micro-batches.
        meets_others = self.layout.tp_size * self.layout.cp_size % self.layout.ep_size > 0
        num_cuts = max(map(len, cuts)) if meets_others else len(mine)
        if self.setup.parallel.virtual_pipeline_model_parallel_size is not None:
            # Interleaved stages take turns in rounds of one micro-batch per stage.
            num_cuts += -num_cuts % self.layout.pp_size
        mine += [[] for _ in range(num_cuts - len(mine))]
        return [
            build_micro_batch(
                rows,
                cut,
                packed=section.packed,
                multiple_of=self.sequence_multiple,
                context_rank=self.layout.cp_rank,
                context_size=self.layout.cp_size,
            )
            for cut in mine
        ]

    def _forward(self, module: Any, micro_batch: MicroBatch, head_loss: Any = None) -> torch.Tensor:
        from megatron_prime.mcore.model import packed_parameters, padded_attention_mask

        device = self.layout.device
        where: dict[str, Any] = {"transformer_engine": self.transformer_engine, "device": device}
        return module(
            micro_batch.input_ids.to(device),
            micro_batch.position_ids.to(device),
            padded_attention_mask(micro_batch, **where),
            labels=micro_batch.targets.to(device),
            loss_mask=micro_batch.predicts.to(device),
            packed_seq_params=packed_parameters(micro_batch, **where),
            head_loss=head_loss,
            context=micro_batch.context,
        )

    def _schedule(
        self, modules: list[Any], micro_batches: Sequence[MicroBatch], step: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """Runs Megatron's schedule.

        Args:
            modules: the parts of the model, wrapped or not.
            micro_batches: of this rank.
            step: (module, micro-batch) -> output, and what to make of it on the last stage.
            forward_only: no backward pass.

        Returns:
            What was made of each micro-batch's output; nothing before the last stage.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        longest = max(m.input_ids.shape[1] for m in micro_batches)
        iterators = [iter(micro_batches) for _ in modules]
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, model: step(model, next(iterator)),
            data_iterator=iterators if len(modules) > 1 else iterators[0],
            model=modules,
            num_microbatches=len(micro_batches),
            seq_length=longest,
            micro_batch_size=1 if self.setup.micro_batch.packed else micro_batches[0].input_ids.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    @on_megatron_platform
    def logprobs(self, rows: TokenRows, *, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs of the response tokens.

        Args:
            rows: the whole batch.
            temperature: divides the logits.

        Returns:
            float32 [B, R] on the CPU, 0 on padding, the same on every rank.
        """
        micro_batches = self._micro_batches(rows, range(rows.mask.shape[0]))
        for chunk in self.chunks:
            chunk.temperature = temperature
            chunk.eval()

        def step(module: Any, micro_batch: MicroBatch) -> tuple[torch.Tensor, Callable[..., Any]]:
            return self._forward(module, micro_batch), lambda output, non_loss_data: output.float().cpu()

        with torch.no_grad():
            outputs = self._schedule(self.modules, micro_batches, step, forward_only=True)
        result = torch.zeros(rows.mask.shape, dtype=torch.float32)
        for micro_batch, output in zip(micro_batches, outputs, strict=False):
            result[micro_batch.rows, micro_batch.columns] = output
        return self.layout.sum_over_data(result)


class TrainableRole(ModelRole):
    """A model with gradients, Megatron's data-parallel wrapper, optimizer and learning-rate schedule."""

    def __init__(self, setup: RoleSetup, optimizer: OptimizerSection, *, num_optimizer_steps: int) -> None:
        super().__init__(setup)
        self._skipped_steps = SkippedSteps(optimizer)
        with megatron_platform():
            from megatron_prime.mcore.optimizer import build_optimizer, build_scheduler, wrap_data_parallel

            self.wrapped = wrap_data_parallel(self.modules, setup.parallel)
            self.optimizer = build_optimizer(self.wrapped, optimizer, setup.model, setup.parallel)
            self.scheduler = build_scheduler(self.optimizer, optimizer, num_optimizer_steps)

    def load_hf(self, folder: HfFolder) -> None:
        super().load_hf(folder)
        with megatron_platform():
            # The float32 masters of a bfloat16 model were copied from the random initialisation: copy them again.
            self.optimizer.reload_model_params()

    @on_megatron_platform
    def optimizer_step(
        self,
        rows: TokenRows,
        selected: Sequence[int],
        loss: TokenLoss,
        *,
        temperature: float = 1.0,
        keep_logprobs: bool = False,
    ) -> StepResult:
        """One optimizer step on the selected rows of the batch.

        Args:
            rows: the whole batch.
            selected: rows of the mini-batch.
            loss: see `measure`.
            temperature: divides the logits.
            keep_logprobs: return the log-probs from before the step.

        Returns:
            As `measure`, with ``skipped``: 1 where the step was left out because it was not finite.

        Raises:
            NonFiniteError: loss, metrics or gradient norm are not finite (nothing has changed then), or the weights
                are not after the step; continue from the last checkpoint. It carries the log-probs.
        """
        from megatron_prime.mcore.optimizer import step_with_norm, stepped_parameters_are_finite

        found = self.measure(rows, selected, loss, temperature=temperature, keep_logprobs=keep_logprobs)
        try:
            is_skipped = self._skipped_steps.skip(found.metrics)
        except NonFiniteError as error:
            raise NonFiniteError(str(error), found.logprobs) from error
        if is_skipped:
            return replace(found, metrics=found.metrics | {"skipped": 1.0})
        step_with_norm(self.optimizer, found.metrics["grad_norm"])
        if collectives.any_process(not stepped_parameters_are_finite(self.optimizer)):
            raise NonFiniteError(
                f"weights are NaN or Inf after the step (learning rate {found.metrics['lr']:g}); lower it "
                "and continue from the last checkpoint",
                found.logprobs,
            )
        self.scheduler.step(increment=1)
        return replace(found, metrics=found.metrics | {"skipped": 0.0})

    @on_megatron_platform
    def measure(
        self,
        rows: TokenRows,
        selected: Sequence[int],
        loss: TokenLoss,
        *,
        temperature: float = 1.0,
        keep_logprobs: bool = False,
    ) -> StepResult:
        """Loss and gradients of the selected rows of the batch; the gradients stay until the next call.

        Args:
            rows: the whole batch.
            selected: rows of the mini-batch.
            loss: called on the last stage for chunks of response tokens; losses and metrics sum over chunks,
                micro-batches and ranks, so both must be normalised by the whole mini-batch.
            temperature: divides the logits.
            keep_logprobs: return the log-probs.

        Returns:
            The summed metrics (a key starting with ``max_`` is maximised), and log-probs where asked for.
        """
        from megatron_prime.mcore.model import HeadLoss
        from megatron_prime.mcore.optimizer import gradient_norm

        micro_batches = self._micro_batches(rows, selected)
        for chunk, wrapped in zip(self.chunks, self.wrapped, strict=True):
            chunk.temperature = temperature
            chunk.train()
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        kept = torch.zeros(rows.mask.shape, dtype=torch.float32) if keep_logprobs else None

        def step(module: Any, micro_batch: MicroBatch) -> tuple[torch.Tensor, Callable[..., Any]]:
            reports: list[Mapping[str, torch.Tensor]] = []
            head_loss = HeadLoss(
                evaluate=ReportingLoss(loss, micro_batch, reports, kept),
                sequence_lengths=micro_batch.response_lengths() if loss.whole_sequences else None,
                with_entropy=loss.with_entropy,
            )
            # Megatron's token count (the second value) is unused because the loss is normalised already.
            return self._forward(module, micro_batch, head_loss), lambda output: (
                output,
                torch.ones((), dtype=torch.int),
                combined(reports),
            )

        reports = self._schedule(self.wrapped, micro_batches, step, forward_only=False)
        metrics = reduce_metrics(self.layout, reports)
        logprobs = None if kept is None else self.layout.sum_over_data(kept)
        norm = gradient_norm(self.optimizer)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        metrics |= {"grad_norm": norm, "lr": learning_rate, "max_imbalance": self.imbalance}
        return StepResult(metrics=metrics, logprobs=logprobs)

    def sleep(self) -> None:
        """See `ModelRole.sleep`."""
        self.residency.sleep(self.chunks, self.wrapped, self.optimizer)

    def settle(self) -> None:
        """Waits for parameters that other ranks have stepped; before anything but another optimizer step reads them."""
        if self.setup.parallel.overlap_param_gather:
            with megatron_platform():
                for wrapped in self.wrapped:
                    wrapped.start_param_sync(force_sync=True)

    def _measure_each(self, rows: TokenRows, loss: TokenLoss, temperature: float = 1.0) -> list[dict[str, float]]:
        """`measure` of every row by itself; without data parallelism, which would need rows for each rank."""
        return [self.measure(rows, [row], loss, temperature=temperature).metrics for row in range(rows.mask.shape[0])]
