"""The only file that knows DeepSpeed: process group, ZeRO engine, finite guard, and live views of the sharded training state.

Everything above sees an `Engine` with the same few methods at every ZeRO stage. What DeepSpeed 0.19.8 does by itself is stated where
we rely on it or work around it; tests/integration repeats each of those facts.
"""

import contextlib
import importlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read by deepspeed at import
warnings.filterwarnings("ignore", category=FutureWarning, message=".*_tensor.*deprecated.*")

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state  # noqa: E402
from pydantic import Field, model_validator  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from gpr_dist.config import Config  # noqa: E402
from gpr_dist.errors import ConfigError  # noqa: E402
from gpr_dist.network import check_launcher, interface_to, shares_store, spans_hosts  # noqa: E402
from gpr_dist.training.watchdog import COLLECTIVE_MARGIN_S  # noqa: E402

STATES = ("param", "exp_avg", "exp_avg_sq")


class EngineConfig(Config):
    """Sharding, precision and optimizer."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage; 3 shards parameters, gradients and optimizer state"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = bf16 parameters and activations with float32 master weights"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, per unit of learning rate"""
    beta1: float = 0.9
    """AdamW's decay of the first moment"""
    beta2: float = 0.98
    """AdamW's decay of the second moment"""
    lr_scales: dict[str, float] = Field({})
    """learning rate of the parameters whose names begin so, relative to that of the others"""
    gradient_clipping: float = 1.0
    """largest global gradient norm; 0 = no clipping"""
    bucket_elements: int = 5_000_000
    """elements per reduction and prefetch bucket; real memory on a GPU"""
    persistence_elements: int = 10_000
    """parameters smaller than this stay gathered on every rank (ZeRO-3)"""
    timeout_seconds: float = Field(1800.0, ge=0)
    """when nothing (forward, backward, update, collective) finishes for so long, every rank writes its stacks to <run>/stacks and leaves;
    collectives give up a minute later. 0 = wait for ever"""

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("precision=bf16 needs zero_stage 1, 2 or 3: DeepSpeed keeps no float32 master weights at stage 0")
        return self


@dataclass(frozen=True)
class StateShard:
    """This rank's flat range [lo, hi) of one parameter, with live views of its float32 master weights and Adam moments."""

    name: str
    lo: int
    hi: int
    tensors: dict[str, Tensor]  # detached; one 1-D float32 view of hi - lo elements per entry of STATES


def init_distributed(timeout_seconds: float = 1800.0) -> None:
    """Join the process group: gloo on CPU, NCCL on CUDA; without a launcher this process is a group of its own.

    GLOO_SOCKET_IFNAME, if unset, becomes the interface to the other hosts.
    Args: timeout_seconds: that of the watchdog, which ends a run that hangs before a collective does; 0 = never.
    """
    check_launcher()
    deepspeed_logger.setLevel("ERROR")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if spans_hosts() and "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # Otherwise DeepSpeed compiles a shared-memory op at start, 30 s, and a kill during that build hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    timeout = timedelta(seconds=timeout_seconds + COLLECTIVE_MARGIN_S) if timeout_seconds else timedelta(days=365)
    backend, attempt = "nccl" if cuda else "gloo", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if shares_store() and attempt != "0":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        dist.init_process_group(backend, store=dist.PrefixStore(f"attempt-{attempt}", store), rank=int(os.environ["RANK"]),
                                world_size=int(os.environ["WORLD_SIZE"]), timeout=timeout)
    with contextlib.redirect_stdout(None):
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _import_muon() -> None:
    """DeepSpeed always imports its Muon optimizer, whose `torch.compile` loads the whole compiler: a second of every start, for nothing."""
    compile_, torch.compile = torch.compile, lambda function=None, **_: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compile_


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose update can be withheld: DeepSpeed still finishes its step and clears its buffers, the weights stay as they are.

    Works alike at every ZeRO stage, because all of them end in this one call. At stage 0 in fp32, where DeepSpeed neither clips by
    nor reports a finite norm, it also clips and measures.
    """

    def __init__(self, params: Any, clip_to: float | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self.withhold = False
        self.clip_to = clip_to
        self.measured_norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.withhold:
            return None
        if self.clip_to is not None:
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            self.measured_norm = float(norm)
            if not torch.isfinite(norm):
                return None  # the gradients are already reduced: every rank decides the same
            if self.clip_to > 0:
                torch.nn.utils.clip_grads_with_norm_(params, self.clip_to, norm)
        return super().step(closure)


def parameter_groups(model: nn.Module, lr_scales: dict[str, float]) -> list[dict[str, Any]]:
    """What an optimizer wants: the parameters, those with a rate of their own apart. Raises: ConfigError where two names claim one."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        found = [scale for prefix, scale in lr_scales.items() if name.startswith(prefix)]
        if len(found) > 1:
            raise ConfigError(f"engine.lr_scales={lr_scales} has {len(found)} entries for {name}; leave one")
        groups.setdefault(found[0] if found else 1.0, []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items() if parameters]


def deepspeed_config(config: EngineConfig, world_size: int) -> dict[str, Any]:
    """The dictionary DeepSpeed wants; nobody writes batch sizes twice, because the caller owns the accumulation boundary."""
    # Stage 1 with float32 accumulation selects DeepSpeed's BF16_Optimizer, which counts micro-batches twice when the caller owns
    # the boundary (measured: gradient norms 1.5 to 2 times too large); without it stage 1 accumulates in bf16 like stage 2's code.
    accumulate_in_bf16 = config.zero_stage == 1 and config.precision == "bf16"
    return {
        "train_batch_size": world_size,  # one "sample" per rank and micro-batch: DeepSpeed only counts with it
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of micro-batches per step; step() is the boundary
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,  # explicit, its default clips at 1.0; stage 0: ours
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "bf16" if accumulate_in_bf16 else "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": config.bucket_elements,
            "allgather_bucket_size": config.bucket_elements,
            "stage3_prefetch_bucket_size": config.bucket_elements,
            "stage3_param_persistence_threshold": config.persistence_elements,
        },
    }


class Engine:
    """A model under ZeRO. Methods marked (collective) must be called by all ranks together."""

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        assert dist.is_initialized(), "call init_distributed first"
        self.config = config
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        clip_to = None if config.zero_stage else config.gradient_clipping
        self.optimizer = GuardedAdamW(parameter_groups(model, config.lr_scales), clip_to=clip_to, lr=0.0,
                                      betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        with contextlib.redirect_stdout(None):
            self.zero, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer,
                                                 config=deepspeed_config(config, self.world_size))
        self.module = self.zero.module
        self._grad_peak = torch.zeros((), device=self.device)
        for parameter in self.module.parameters():
            parameter.register_hook(self._watch)
        self.last_progress = time.monotonic()  # when something last finished; the watchdog looks at it

    # --- one step -------------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.zero(*args, **kwargs)
        self.last_progress = time.monotonic()
        return output

    def train(self, mode: bool = True) -> None:
        self.zero.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's share of the step's loss; shares add up over ranks and micro-batches."""
        self.zero.backward(loss * self.world_size)  # DeepSpeed averages over ranks, our shares sum
        self.last_progress = time.monotonic()

    def gradients_are_finite(self) -> bool:
        """Whether every gradient this rank computed since the last step was finite, whatever the ZeRO stage does with them later."""
        return bool(torch.isfinite(self._grad_peak))

    def step(self, lr: float, apply: bool = True) -> tuple[float, bool]:
        """Update the weights, or with apply=False drop the accumulated gradients (collective: all ranks pass the same `apply`).

        Returns: (global gradient norm before clipping, whether the weights were updated).
        """
        self.optimizer.withhold = not apply
        self.optimizer.measured_norm = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.zero.step()
        self._clear_gradient_buffers()
        self._grad_peak.zero_()
        self.last_progress = time.monotonic()
        if self.optimizer.clip_to is not None:
            norm = self.optimizer.measured_norm
        else:
            norm = self.zero.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        # was_step_applied: DeepSpeed's own check after the reduction, where finite gradients may have overflowed in the sum.
        return norm, apply and self.zero.was_step_applied() and norm == norm and norm != float("inf")

    def _watch(self, grad: Tensor) -> None:
        # The infinity norm is NaN or inf exactly when an element is; maximum keeps NaN. Stays on the device, no synchronisation.
        if grad.numel():
            self._grad_peak = torch.maximum(self._grad_peak, torch.linalg.vector_norm(grad.detach(), float("inf")).float())

    def _clear_gradient_buffers(self) -> None:
        # ZeRO-3 in 0.19.8 never zeroes its partitions: a parameter that no rank uses in the next step would be updated again with
        # this step's gradient, and a NaN left there would make every later step be skipped.
        if self.config.zero_stage == 3:
            for buffer in self.zero.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
                buffer.zero_()

    # --- talking to the other ranks -------------------------------------------------------------------------------------------

    def all_reduce(self, values: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum or maximum over ranks, as a new tensor on the engine's device (collective)."""
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        self.last_progress = time.monotonic()
        return values

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        dist.barrier()
        self.last_progress = time.monotonic()

    # --- state ----------------------------------------------------------------------------------------------------------------

    def state_shards(self) -> Iterator[StateShard]:
        """This rank's part of the training state, as live views; over all ranks the ranges tile every trained parameter."""
        self._materialise_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield from self._shards_of(name, parameter)

    def _shards_of(self, name: str, p: nn.Parameter) -> Iterator[StateShard]:
        if self.config.zero_stage == 3:
            part = p.ds_tensor.ds_numel
            lo = min(part * self.rank, p.ds_numel)
            hi = min(lo + part, p.ds_numel)  # the last partition is padded
            if lo < hi:
                whole = [safe_get_local_fp32_param(p)] + [safe_get_local_optimizer_state(p, key) for key in STATES[1:]]
                yield StateShard(name, lo, hi, {key: t.detach().view(-1)[: hi - lo] for key, t in zip(STATES, whole, strict=True)})
        elif hasattr(p, "_hp_mapping"):
            if p._hp_mapping is not None:  # None: another rank owns all of this parameter
                address = p._hp_mapping.lp_fragment_address
                tensors = {key: p._hp_mapping.get_hp_fragment(None if key == "param" else key).detach().view(-1) for key in STATES}
                yield StateShard(name, address.start, address.start + address.numel, tensors)
        else:  # stage 0: everything is everywhere, each rank answers for an equal part
            lo, hi = p.numel() * self.rank // self.world_size, p.numel() * (self.rank + 1) // self.world_size
            if lo < hi:
                master, moments = self._unsharded(p)
                tensors = {"param": master, **moments}
                yield StateShard(name, lo, hi, {key: t.view(-1)[lo:hi] for key, t in tensors.items()})

    def loadable_shards(self) -> Iterator[StateShard]:
        """The ranges this rank must receive on load: its own, except at stage 0, where every rank needs everything."""
        if self.config.zero_stage:
            yield from self.state_shards()
            return
        self._materialise_optimizer_state()
        for name, p in self.module.named_parameters():
            master, moments = self._unsharded(p)
            yield StateShard(name, 0, p.numel(), {key: t.view(-1) for key, t in {"param": master, **moments}.items()})

    def _unsharded(self, p: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.optimizer.state[p]
        return p.data, {key: state[key] for key in STATES[1:]}

    @property
    def optimizer_step(self) -> int:
        """Updates AdamW has made, the exponent of its bias correction."""
        for state in self.optimizer.state.values():
            return int(state["step"])
        return 0

    def finish_loading(self, optimizer_step: int) -> None:
        """After the master weights were filled in place: refresh every copy made from them (collective)."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(optimizer_step))
        zero = self.zero.optimizer
        if self.config.zero_stage == 3:
            for p in self.module.parameters():
                lo = min(p.ds_tensor.ds_numel * self.rank, p.ds_numel)
                hi = min(lo + p.ds_tensor.ds_numel, p.ds_numel)
                if p.requires_grad and lo < hi:
                    p.ds_tensor.data.view(-1)[: hi - lo].copy_(safe_get_local_fp32_param(p).view(-1)[: hi - lo])
            if zero.persistent_parameters:  # these keep a full copy, which must come from the new partitions
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.config.zero_stage:
            zero.update_lp_params()
        self.barrier()

    def copy_weights(self) -> list[Tensor]:
        """What this rank holds of the weights that forwards use (not of the masters behind them): its partitions at stage 3, else all."""
        return [held.clone() for held in self._held_weights()]

    @contextlib.contextmanager
    def weights(self, copy: list[Tensor]) -> Iterator[None]:
        """Compute with other weights for a while, from `copy_weights`; no update and no load meanwhile (collective)."""
        self._exchange(copy)
        try:
            yield
        finally:
            self._exchange(copy)

    @torch.no_grad()
    def _held_weights(self) -> list[Tensor]:
        held = [p.ds_tensor if self.config.zero_stage == 3 else p for p in self.module.parameters()]
        return [tensor.detach().view(-1) for tensor in held]

    @torch.no_grad()
    def _exchange(self, other: list[Tensor]) -> None:
        zero = self.zero.optimizer
        if self.config.zero_stage == 3:  # some parameters stay gathered between forwards, and would keep the old values
            zero.parameter_offload.partition_all_parameters()
        for held, theirs in zip(self._held_weights(), other, strict=True):
            before = held.clone()
            held.copy_(theirs)
            theirs.copy_(before)
        if self.config.zero_stage == 3 and zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _materialise_optimizer_state(self) -> None:
        # torch's AdamW makes its state at the first step; a checkpoint may be read or written before it. At stage 3 the optimizer
        # only meets its flat partitions one after another, during step().
        if self.config.zero_stage == 3:
            flat = self.zero.optimizer.fp32_partitioned_groups_flat
        else:
            flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in flat:
            if "exp_avg" not in self.optimizer.state[p]:
                fresh = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p).detach(), "exp_avg_sq": torch.zeros_like(p).detach()}
                self.optimizer.state[p].update(fresh)
        link = getattr(self.zero.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def close(self) -> None:
        """Leave the process group (collective)."""
        self.barrier()
        dist.destroy_process_group()
