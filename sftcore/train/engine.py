"""The engine: one optimizer step from the packs of a step, through DeepSpeed.

In: an objective, a recipe, this rank's batches. Out: the step's exact loss, metrics and gradient norm;
updated weights.
Invariant: R ranks x M micro-batches take the same step as one process with one batch.
Trade-off: DeepSpeed also runs for one process (about 1 % of a 135M step), so what is debugged is what is
scaled.

The divisors. Batch weights already hold the step's divisor (collate), so a rank's loss is its exact share
and the step's loss (and each of its metrics) is the plain sum over packs and ranks:

    L = sum_r sum_m L_rm          (what we want the gradient of)

DeepSpeed averages gradients over `world` ranks: it would step along (1 / world) sum_r grad L_r.
`Engine.step` therefore runs backward on world * L_rm, and asks for no division by accumulation steps
(scale_wrt_gas=False).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which else warns and guesses
os.environ.setdefault("DS_LOG_LEVEL", "warning")
import deepspeed
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig

from sftcore import dist
from sftcore.batching.collate import Batch
from sftcore.config import Recipe
from sftcore.errors import Problem, TrainingFailed, UserInputError
from sftcore.heap import keep_freed_memory
from sftcore.model.forward import output_head
from sftcore.model.kept import kept_pattern, persistent_buffers
from sftcore.model.loss import TrainedTokenHead
from sftcore.model.quantise import keep_trainable_layout
from sftcore.model.tied import share_gradient
from sftcore.objectives import Metrics, Objective
from sftcore.recipe import deepspeed_file
from sftcore.train.builds import await_other_builds, finds_library, put_own_programs_first
from sftcore.train.casting import casting_all_but, keep_float32
from sftcore.train.compatibility import ASYNC_IO, check_combination, need_of
from sftcore.train.ds_config import autocasts, complete_ds_config, zero_stage
from sftcore.train.gradient_sums import add_without_copies, sum_head_in_place
from sftcore.train.optimizers import make_optimizer, set_learning_rate
from sftcore.train.outcome import NotFinite, StepResult, StopAsked, never
from sftcore.train.stopping import Abandoned, packs_between_looks

log = logging.getLogger(__name__)


def check_engine(ds_config: dict[str, Any], optimizer: str, *, has_cuda: bool | None = None) -> None:
    """Refuse a configuration that DeepSpeed can't run on such a machine, or with this optimizer.

    Args:
        has_cuda: whether ranks have GPUs; None: as this machine.

    Raises:
        MissingEnvironmentError: it needs CUDA or asynchronous file access (looked for on this machine).
        UserInputError: Muon with sharded state.
    """
    check_combination(
        ds_config,
        optimizer,
        has_cuda=torch.cuda.is_available() if has_cuda is None else has_cuda,
        has_async_io=need_of(ds_config) is ASYNC_IO and has_async_io(),
    )


@functools.cache
def has_async_io() -> bool:
    """Whether DeepSpeed's async_io operation can be built here; its look compiles and links, so it is one."""
    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def may_have_async_io() -> bool:
    """As `has_async_io`, without a run of the linker (0.2 s) where libaio is in none of its folders."""
    return finds_library("aio") and has_async_io()


def init_process_group() -> None:
    """Join the other ranks; a process without a launcher becomes rank 0 of 1."""
    dist.fill_environment()
    dist.claim_device()
    put_own_programs_first()
    await_other_builds()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=dist.RENDEZVOUS_TIMEOUT, verbose=False)
    dist.barrier()
    _unlink_reduce_buffer()


def _unlink_reduce_buffer() -> None:
    """Unlink the shared memory (66 MiB a rank) through which DeepSpeed 0.19 reduces on CPUs of one machine.

    DeepSpeed never does. Every rank has mapped all of it by now, so that it lives until the last one ends,
    however that one ends; a later run with the same port can't open what a killed one left.
    """
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], dist.rank())
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))
    Path("/dev/shm", name).unlink(missing_ok=True)


def whole_size(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter, whether or not ZeRO-3 has cut it up."""
    return int(vars(parameter).get("ds_numel", parameter.numel()))


class Engine:
    """DeepSpeed in three verbs: step, save, load."""

    def __init__(
        self, model: Objective, recipe: Recipe, ds_config: dict[str, Any], *, loads_universal: bool = False
    ) -> None:
        """Wrap `model`; must be called by all ranks after `init_process_group`.

        Args:
            ds_config: as read by `read_ds_config`.
            loads_universal: `load` will be given a checkpoint converted for another world size.
        """
        keep_freed_memory()
        self.stage = zero_stage(ds_config)
        self.autocasts = autocasts(ds_config, recipe)
        self.save_dtype = model.causal_lm.dtype
        self.trains_adapter = recipe.adapter.kind != "none"
        if self.autocasts:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.stage < 3 and not self.trains_adapter:  # at stage 3 the lookup's weight is gone by the head
            share_gradient(model.causal_lm)
        optimizer = make_optimizer(model, recipe.train)
        self._hooked_norm: float | None = None
        self._packs_between_looks = 1  # the first step's time is not known yet
        optimizer.register_step_pre_hook(lambda *_: self._before_update(model, recipe.train.max_grad_norm))
        complete = complete_ds_config(ds_config, recipe)
        if loads_universal:
            complete["checkpoint"] = {**complete.get("checkpoint", {}), "load_universal": True}
        _check_config(complete, recipe)
        kept = keep_float32(model.causal_lm, autocasts=self.autocasts, stage=self.stage)
        # its figures of memory, at any log level
        with casting_all_but(kept), contextlib.redirect_stdout(io.StringIO()) as said:
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=complete)
        log.debug("DeepSpeed: %s", said.getvalue())
        self.device = self.deepspeed.device
        self._leave_lone_gradients_alone()
        self._after_backward: Callable[[], None] = lambda: None
        if add_without_copies(self.deepspeed.optimizer):
            head = output_head(model.causal_lm)
            self._after_backward = sum_head_in_place(self.deepspeed.optimizer, head)

    @property
    def objective(self) -> Objective:
        """The wrapped objective (its parameters are sharded under ZeRO-3)."""
        return self.deepspeed.module

    def step(
        self,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        rates: Mapping[str, float],
        stop: StopAsked = never,
    ) -> StepResult:
        """Forward and backward over this rank's packs, then one optimizer step over all ranks.

        A request to stop that comes while the last pack is computed lets the step be finished; one that comes
        before is seen between packs, about each `LOOK_SECONDS`, and the step is given up.

        Args:
            batches: this rank's packs; as many on every rank (idle ones have zero weights).
            seeds: one per pack, for dropout.
            rates: of this step by name: `lr` for the optimizer, all for the objective.
            stop: whether this rank was asked to stop by now.

        Raises:
            Abandoned: a rank was asked to stop between packs; weights and optimizer are untouched, and the
                engine may be saved, but gradients are left: no step may follow.
            NotFinite: the loss or the gradient norm; weights and optimizer are untouched.
        """
        self.deepspeed.train()
        self.objective.rates = rates
        started = time.perf_counter()
        rows: list[torch.Tensor] = []
        names: list[str] = []
        for batch, seed in zip(batches, seeds, strict=True):
            if (len(rows) + 1) % self._packs_between_looks == 0 and dist.any_rank(stop()):
                raise Abandoned
            loss, metrics = self._forward_backward(batch, seed)
            names = sorted(metrics)
            rows.append(_row_of(loss, metrics, is_idle=not batch.num_tokens))
        rank_losses, *rank_metrics = zip(*torch.stack(rows).tolist(), strict=True)
        seconds = time.perf_counter() - started
        (loss_sum, seconds_sum, *metric_sums), (seconds_max, any_stop, peak) = dist.sums_and_maxima(
            [sum(rank_losses), seconds, *map(sum, rank_metrics)],
            [seconds, float(stop()), dist.peak_memory_bytes()],
        )
        self._packs_between_looks = packs_between_looks(seconds_max, len(batches))
        if not math.isfinite(loss_sum):
            raise NotFinite(
                f"the loss is {loss_sum}",
                [number for number, loss in enumerate(rank_losses) if not math.isfinite(loss)],
            )
        set_learning_rate(self.deepspeed.basic_optimizer.param_groups, rates["lr"])
        self.deepspeed.step()  # skips the update, or our hook raises, if the norm is not finite
        return StepResult(
            loss=loss_sum,
            metrics=dict(zip(names, metric_sums, strict=True)),
            grad_norm=self._finite_grad_norm(),
            stop_requested=bool(any_stop),
            rank_imbalance=seconds_max * dist.world_size() / seconds_sum - 1,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=int(peak),
        )

    def rehearse(self, batch: Batch, *, rates: Mapping[str, float]) -> None:
        """Run a weightless batch ahead of a step's own: it adds zeros to the gradient.

        All ranks must call it, before `step`.
        """
        self.deepspeed.train()
        self.objective.rates = rates
        self._forward_backward(batch, seed=0)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Run parts of the model outside of a step: ZeRO-3 gathers weights used outside their module, too."""
        containers: list[Any] = [module._parameters for module in self.deepspeed.module.modules()]
        if self.stage == 3:
            for container in containers:
                container._in_forward = True
        try:
            yield
        finally:
            if self.stage == 3:
                for container in containers:
                    container._in_forward = False

    def evaluate(self, batches: Iterable[Batch], *, stop: StopAsked = never) -> float:
        """Sum of the batches' losses over all ranks, in eval mode; as many batches on every rank.

        Raises:
            Abandoned: a rank was asked to stop.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.visit(batches, lambda batch: total.add_(self.deepspeed(batch)[0]), stop=stop)
        (loss,), _ = dist.sums_and_maxima([float(total)], [])
        return loss

    def visit(self, batches: Iterable[Batch], see: Callable[[Batch], object], *, stop: StopAsked) -> None:
        """Hand each batch to `see`, on the device, in eval mode and without gradient.

        Raises:
            Abandoned: a rank was asked to stop.
        """
        self.deepspeed.eval()
        keep_trainable_layout(self.deepspeed.modules())
        with torch.no_grad(), self.autocast():
            for number, batch in enumerate(batches, 1):
                see(batch.to(self.device))
                if number % self._packs_between_looks == 0 and dist.any_rank(stop()):
                    raise Abandoned

    def save(self, folder: Path) -> None:
        """Write trained weights and optimizer state below `folder`; all ranks must call it."""
        self.deepspeed.save_checkpoint(
            str(folder), tag="ds", save_latest=False, exclude_frozen_parameters=self.trains_adapter
        )

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, at the same world size; all ranks must call it."""
        optimizer = self.deepspeed.basic_optimizer
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        path, _ = self.deepspeed.load_checkpoint(
            str(folder), tag="ds", load_module_strict=not self.trains_adapter
        )
        if path is None:
            raise TrainingFailed(f"DeepSpeed found no state in {folder}")
        # Loading a universal checkpoint at stage 3, DeepSpeed 0.19.8 gives all groups one step counter, which
        # each then advances, and the first group's weight decay.
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The causal LM's weights and buffers (of an adapter run, the trained ones) by name, as loaded in.

        That is the recipe's dtype, but float32 for what transformers keeps in it. They come on rank 0's CPU,
        one after another; other ranks get none, but must come along to the end: under ZeRO-3 each parameter
        is gathered in turn.
        """
        model = self.objective.causal_lm
        kept = kept_pattern(model)
        for name, parameter in model.named_parameters():
            if self.trains_adapter and not parameter.requires_grad:
                continue
            dtype = torch.float32 if kept is not None and kept.search(name) else self.save_dtype
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                whole = parameter.detach().to("cpu", dtype, copy=True) if dist.rank() == 0 else None
            if whole is not None:
                yield name, whole
        if dist.rank() == 0 and not self.trains_adapter:
            for name, buffer in persistent_buffers(model).items():
                yield name, buffer.detach().to("cpu", copy=True)

    def close(self) -> None:
        """Free DeepSpeed's buffers and the model's weights.

        DeepSpeed 0.19.8 leaves its functions and flat buffers hanging on the parameters, and at stage 3 the
        modules in a cache: weights, float32 masters and gradients would stay as long as the process.
        """
        self.deepspeed.destroy()
        self._after_backward = lambda: None
        for module in self.deepspeed.module.modules():
            if isinstance(module, TrainedTokenHead):
                module.gradient_sum = None
        for parameter in self.deepspeed.module.parameters():
            parameter.__dict__.clear()
            parameter.data = parameter.data.new_empty(0)
        for optimizer in (self.deepspeed.optimizer, self.deepspeed.basic_optimizer):
            vars(optimizer).clear()
        del self.deepspeed

    def _leave_lone_gradients_alone(self) -> None:
        """One rank has nothing to reduce, but DeepSpeed would copy and round all gradients for it.

        ZeRO-1 in bfloat16 flattens them into a float32 copy and casts that to bfloat16 and back: 6 bytes a
        weight and a third of the update's time. Where a ZeRO optimizer itself reduces, it also sorts the
        gradients into its partition, and must go on doing so.
        """
        optimizer_reduces = self.stage >= 2 or hasattr(self.deepspeed.optimizer, "reduce_gradients")
        if dist.world_size() == 1 and not optimizer_reduces:
            self.deepspeed.enable_backward_allreduce = False

    def _forward_backward(self, batch: Batch, seed: int) -> tuple[torch.Tensor, Metrics]:
        torch.manual_seed(seed)
        with self.autocast():
            loss, metrics = self.deepspeed(batch.to(self.device))
        self.deepspeed.backward(loss * dist.world_size(), scale_wrt_gas=False)
        self._after_backward()
        return loss.detach(), metrics

    def autocast(self) -> torch.autocast:
        """How forwards are computed: in bfloat16 from float32 weights at stage 0, else as the weights are."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocasts)

    def _finite_grad_norm(self) -> float:
        # DeepSpeed's engine learns the norm after the step, its optimizer before; -1 stands for not finite
        norm = self._hooked_norm if self.stage == 0 else self.deepspeed.optimizer._global_grad_norm
        assert norm is not None
        if not math.isfinite(norm) or norm < 0:
            raise NotFinite("the gradient norm is not finite", [])
        return float(norm)

    def _before_update(self, model: Objective, max_norm: float) -> None:
        """At stage 0 gradients are whole on each rank when the optimizer steps: measure and clip them there.

        At every stage the norm, the same on all ranks, is known by now: no update follows a bad one.
        """
        if self.stage == 0:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
            self._hooked_norm = norm.item()
        self._finite_grad_norm()


def _row_of(loss: torch.Tensor, metrics: Metrics, *, is_idle: bool) -> torch.Tensor:
    """(1 + number of metrics,) float64: the loss, then the metrics by name; 0 for a pack without work."""
    values = [loss, *(0.0 if is_idle else metrics[name] for name in sorted(metrics))]
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=loss.device).detach() for v in values])


def _check_config(complete: dict[str, Any], recipe: Recipe) -> None:
    """Refuse a configuration that DeepSpeed itself can't read.

    Raises:
        UserInputError: with what DeepSpeed says.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(copy.deepcopy(complete))
    except Exception as error:  # its sections raise whatever a value of another type leads to
        what = f"DeepSpeed can't read this: {str(error).split('For further')[0].strip()}"
        raise UserInputError(Problem(what=what, where=str(deepspeed_file(recipe)))) from error
