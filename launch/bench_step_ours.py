"""Our side of `bench.py step`, in a process of its own: generated journeys, the whole training step, and each part of it alone.

Serves three models: `gpr` (the one we train, on journeys of a given shape), `gpr_like_peer` (the same on the very rows that
gpr-recsys takes) and `hstu` (our encoder as plain HSTU over items). Without DeepSpeed: one process, AdamW, the step's other arithmetic
as in training.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from bench_step_peers import LEARNING_RATE, TEMPERATURE, Steps, dtype_of, hstu_input, serve
from bench_step_products import Bare, Products
from torch import Tensor, nn

import gpr_dist.model.hsd
import gpr_dist.model.ptd
from gpr_dist.data.collate import JourneyColumns, collate
from gpr_dist.model.flops import TRAINING_FACTOR, forward_flops, work_of
from gpr_dist.model.gpr import GPR, GPRConfig, GPROutput
from gpr_dist.model.hsd import HSD, HSDConfig
from gpr_dist.model.typed import NUM_TYPES
from gpr_dist.objectives.mtp import mtp_loss, refining_loss, uniform_head_weights, value_loss
from gpr_dist.ops.attention import hybrid_attention
from gpr_dist.ops.cross_entropy import item_nll
from gpr_dist.ops.noise import dropout
from gpr_dist.schema import EVERY_AD, NO_ITEM, Action, Batch, TokenType

# B rows  R requests  T tokens  N targets  L levels  D width  M items  S sampled negatives

VALUE_LOSS_WEIGHT, REFINING_LOSS_WEIGHT = 0.1, 0.1  # the defaults of training
NUM_ITEMS = 50_000
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
PARTS = ("input embedding", "HSD without attention", "HSD attention", "PTD keys and values", "PTD opening", "PTD generation", "code loss",
         "HTE", "of which PTD attention", "optimizer")
DENSE = {"HSD": ("HSD without attention",), "PTD": ("PTD keys and values", "PTD opening", "PTD generation")}


def generate_batch(model: GPRConfig, rows: int, tokens: float, organic: float, ads: int, spread: float, seed: int) -> Batch:
    """Journeys of U and then requests O* E I+, every request a target.

    Args: tokens: of a journey, on average. organic: O tokens of a request, on average. ads: most I tokens of a request.
        spread: sigma of the log-normal number of requests of a journey.
    """
    rng = np.random.default_rng(seed)
    mean = (tokens - 1) / (organic + 1 + (ads + 1) / 2)
    requests_B = np.maximum(1, np.rint(mean * rng.lognormal(-spread**2 / 2, spread, rows))).astype(np.int64)
    num_requests = requests_B.sum()
    counts_RC = np.stack([np.zeros(num_requests, np.int64), rng.integers(0, round(2 * organic) + 1, num_requests),
                          np.ones(num_requests, np.int64), rng.integers(1, ads + 1, num_requests)], 1)
    first_R = np.cumsum(requests_B) - requests_B
    counts_RC[first_R, TokenType.U] = 1
    tokens_R = counts_RC.sum(1)
    token_type_T = np.repeat(np.tile(np.array(TokenType), num_requests), counts_RC.ravel())
    block_T = np.repeat(np.arange(num_requests) - np.repeat(first_R, requests_B), tokens_R)
    return _collate(model, token_type_T, block_T, np.add.reduceat(tokens_R, first_R), 0, 0, rng)


def peer_batch(model: GPRConfig, rows: int, positions: int, organic: int, every_request: bool, seed: int) -> Batch:
    """gpr-recsys's full rows, U O… E I…: every ad a request of its own, or the last ad the only one, with labels for all heads."""
    ads = positions - organic - 2
    lookahead = 0 if every_request else model.num_mtp_heads - 1
    token_type_t = np.repeat(np.array(TokenType), [1, organic, 1, ads + lookahead])
    block_t = np.maximum(0, np.arange(positions + lookahead) - organic - 2)
    return _collate(model, np.tile(token_type_t, rows), np.tile(block_t, rows), np.full(rows, positions + lookahead),
                    0 if every_request else positions - 1, lookahead, np.random.default_rng(seed))


def _collate(model: GPRConfig, token_type_T: np.ndarray, block_T: np.ndarray, length_B: np.ndarray, context: int, lookahead: int,
             rng: np.random.Generator) -> Batch:
    """Draw everything else and lay it out as the loader does."""
    total, rows, offsets_B1 = len(token_type_T), len(length_B), np.append(0, np.cumsum(length_B))
    has_item, is_ad = token_type_T % 2 == 1, token_type_T == TokenType.I
    ad_only = lambda values: np.where(is_ad, values, np.nan).astype(np.float32)  # noqa: E731
    tokens = {
        "token_type": token_type_T.astype(np.int64), "block": block_T,
        "item": np.where(has_item, rng.integers(0, NUM_ITEMS, total), NO_ITEM),
        "action": np.where(is_ad, rng.integers(Action.IMPRESSION, Action.CONVERSION + 1, total), has_item * Action.CONSUME),
        "scene": rng.integers(0, 1000, total), "timestamp": 1_700_000_000 + np.cumsum(rng.integers(0, 3600, total)),
        "value": ad_only(rng.exponential(10, total)), "pctr": ad_only(rng.random(total)), "pcvr": ad_only(rng.random(total))}

    def side(kind: TokenType, fields: int) -> tuple[np.ndarray, np.ndarray]:
        ends = fields * np.append(0, np.cumsum(token_type_T == kind))[offsets_B1]
        return ends, rng.integers(0, 2**31, ends[-1])

    blocks_B = block_T[offsets_B1[1:] - 1] + 1
    sides = {"user_features": side(TokenType.U, model.num_user_features), "env_features": side(TokenType.E, model.num_env_features),
             "eligibility": (np.append(0, np.cumsum(blocks_B)), np.full(blocks_B.sum(), EVERY_AD))}
    journeys = JourneyColumns(np.full(rows, context), np.full(rows, lookahead), offsets_B1, tokens, sides)
    codes_ML = rng.integers(0, model.codebook_size, (NUM_ITEMS, model.num_levels))
    batch = collate(journeys, np.arange(rows), codes_ML, model.num_mtp_heads, model.num_user_features, model.num_env_features)
    knowledge = model.knowledge
    if knowledge.num_vectors:
        batch.knowledge_BmE = torch.from_numpy(rng.standard_normal((rows, knowledge.num_vectors, knowledge.width), np.float32))
    return batch


def gpr(settings: dict) -> Steps:
    """Our model on journeys of the size asked for."""
    size = settings["size"]
    config = GPRConfig(**size["model"])
    shape = {name: size[name] for name in ("rows", "tokens", "organic", "ads", "spread")}
    return Training(config, generate_batch(config, **shape, seed=settings["seed"]), settings).steps()


def gpr_like_peer(settings: dict) -> Steps:
    """Our model on gpr-recsys's rows, at its width and depth."""
    config = GPRConfig(**settings["model"])
    shape = {name: settings[name] for name in ("rows", "positions", "organic", "every_request", "seed")}
    return Training(config, peer_batch(config, **shape), settings).steps()


class Training:
    """A model, a batch and an optimizer; float32 master weights beside a bf16 model, as in training."""

    def __init__(self, config: GPRConfig, batch: Batch, settings: dict) -> None:
        torch.manual_seed(settings["seed"])
        self.config, self.precision = config, settings["precision"]
        self.device = torch.device(settings.get("device", "cpu"))
        self.model = GPR(config).to(self.device, dtype_of(self.precision)).train()
        self.batch = batch.to(self.device)
        self.head_weight_P = uniform_head_weights(config.num_mtp_heads, self.device)
        self.work = work_of(self.batch, config.num_mtp_heads, config.ptd.intent_window)
        self.update = Update(self.model)
        self.made_parts: dict[str, Callable[..., None]] = {}
        self.bare: dict[str, Bare] = {}

    def steps(self) -> Steps:
        names = [*PARTS, *(["PTD refining loss"] if self.config.ptd.refining else [])]
        parts = {f"part: {name}": partial(self.part, name) for name in names}
        products = {f"products: {decoder}": partial(self.products, decoder) for decoder in DENSE}
        return {"describe": self.describe, "kept": self.kept, "step": self.step, "matmul": partial(matmul, self.device, self.precision),
                **parts, **products}

    def part(self, name: str) -> None:
        """Run a part; the first one asked for makes them all."""
        self.made_parts = self.made_parts or self.parts()
        self.made_parts[name]()

    def products(self, decoder: str) -> dict:
        """The bare matrix products of a decoder's dense parts, recorded the first time."""
        if decoder not in self.bare:
            self.made_parts = self.made_parts or self.parts()
            with Products(ignored=NUM_TYPES) as seen:
                for name in DENSE[decoder]:
                    self.made_parts[name](skip_attention=True)
            self.bare[decoder] = Bare(seen.layouts, self.device)
        return self.bare[decoder]()

    def describe(self) -> dict:
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "tokens": self.batch.num_tokens,
                "targets": self.batch.num_targets, "head_targets": len(self.batch.target_head_N),
                "flops": {part: TRAINING_FACTOR * flops for part, flops in forward_flops(self.config, self.work).items()}}

    def kept(self) -> dict:
        """Bytes that each part keeps from its forward for its backward; what two parts share counts in both."""
        self.made_parts = self.made_parts or self.parts()
        return {name: part.kept_bytes() for name, part in self.made_parts.items() if isinstance(part, Part)}

    def step(self) -> dict:
        self.model.zero_grad()
        loss = self.loss(self.model(self.batch))
        loss.backward()
        self.update()
        return {"loss": float(loss.detach()), "targets": self.batch.num_targets}

    def loss(self, output: GPROutput) -> Tensor:
        batch = self.batch
        how = batch.target_head_N, self.head_weight_P, batch.num_targets
        loss = mtp_loss(output.nll_NL, *how) + VALUE_LOSS_WEIGHT * value_loss(output.values_NL1, batch.target_value_N, *how)
        if output.refining_N is not None:
            loss = loss + REFINING_LOSS_WEIGHT * refining_loss(output.refining_N, *how)
        return loss if output.router is None else loss + output.router

    def parts(self) -> dict[str, Callable[..., None]]:
        """Every part alone, forward and backward, from detached inputs that one whole pass leaves; "of which" repeats work of others.

        Attention alone is the calls that the whole pass makes; a part "without attention" makes them cost nothing.
        """
        model, batch, heads = self.model, self.batch, self.config.num_mtp_heads
        pair_Q = torch.unique(batch.target_request_N * heads + batch.target_head_N)
        where = {"request_N": batch.target_request_N, "head_N": batch.target_head_N}
        how = batch.target_head_N, self.head_weight_P, batch.num_targets
        seen: dict[str, list] = {"hsd": [], "ptd": []}
        with Recorded(seen):
            x_TD = model.tokens(batch, model.codes)
            hidden_TD, _ = model.hsd(x_TD, batch)
            intents = model.ptd(hidden_TD, task="read", batch=batch)
            opening = model.ptd(intents, task="open", request_Q=pair_Q // heads, head_Q=pair_Q % heads)
            code_NLD = model.codes(batch.target_codes_NL)
            state_NLD = model.ptd(opening, task="generate", prefix_NlD=code_NLD[:, :-1], **where)

        def code_loss(state_NLD: Tensor) -> tuple:
            nll_NL = model.codes(state_NLD, task="nll", codes_NL=batch.target_codes_NL, offset_NLV=None)
            return mtp_loss(nll_NL, *how), model.codes(batch.target_codes_NL)

        def values(state_NLD: Tensor, code_NLD: Tensor) -> Tensor:
            return value_loss(model.hte(state_NLD, code_NLD), batch.target_value_N, *how)

        def generate(opening: Any, code_NLD: Tensor) -> Tensor:
            return model.ptd(opening, task="generate", prefix_NlD=code_NLD[:, :-1], **where)

        def refine(opening: Any, code_NLD: Tensor) -> Tensor:
            return model.ptd(opening, task="refine", ad_ND=code_NLD.sum(1), **where)

        self.step()
        update = partial(self.update, [parameter.grad for parameter in self.model.parameters()])
        parts = dict(zip(PARTS, (
            Part(model, lambda: model.tokens(batch, model.codes)),
            Part(model, lambda x_TD: model.hsd(x_TD, batch), x_TD, skip_attention=True),
            Part(model, replay, seen["hsd"]),
            Part(model, lambda hidden_TD: model.ptd(hidden_TD, task="read", batch=batch), hidden_TD),
            Part(model, lambda intents: model.ptd(intents, task="open", request_Q=pair_Q // heads, head_Q=pair_Q % heads), intents),
            Part(model, generate, opening, code_NLD),
            Part(model, code_loss, state_NLD),
            Part(model, values, state_NLD, code_NLD),
            Part(model, replay, seen["ptd"]),
            update,
        ), strict=True))
        if self.config.ptd.refining:
            parts["PTD refining loss"] = Part(model, refine, opening, code_NLD)
        return parts


class Update:
    """Clip, AdamW, and for a bf16 model the way over float32 master weights."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        in_place = self.parameters[0].dtype == torch.float32
        self.masters = self.parameters if in_place else [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, betas=(0.9, 0.98))

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor] | None = None) -> None:
        """Args: gradients: of the parameters, in their order; none = their own."""
        if gradients is not None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)


class Part:
    """One part of the step: forward and backward from inputs cut off from the graph that made them."""

    def __init__(self, model: nn.Module, function: Callable, *inputs: Any, skip_attention: bool = False) -> None:
        self.model, self.function, self.inputs, self.skip_attention = model, function, cut(inputs), skip_attention

    def kept_bytes(self) -> int:
        """Of the tensors that autograd keeps, each storage once; parameters are not among them."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self._forward(self.skip_attention)  # held until all are counted, or storages would be used again
        del output
        return sum(kept.values())

    def _forward(self, skip_attention: bool) -> Any:
        with ExitStack() as stack:
            for module in (gpr_dist.model.hsd, gpr_dist.model.ptd) if skip_attention else ():
                stack.enter_context(patch.object(module, "hybrid_attention", lambda q, k, v, *_, **__: FreeAttention.apply(q, k, v)))
            return self.function(*self.inputs)

    def __call__(self, skip_attention: bool = False) -> None:
        self.model.zero_grad()
        for tensor in tensors(self.inputs):
            tensor.grad = None
        output = self._forward(skip_attention or self.skip_attention)
        found = [tensor for tensor in tensors(output) if tensor.grad_fn is not None]
        torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])


class FreeAttention(torch.autograd.Function):
    """In the place of attention, with gradients of the right shapes, at the cost of filling memory."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return q.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(x) for x in ctx.saved_tensors)


@dataclasses.dataclass
class Call:
    """One attention of the whole pass."""

    tensors: tuple[Tensor, Tensor, Tensor]
    spans: Any
    arguments: tuple
    keywords: dict


class Recorded:
    """While open, keeps the attention calls of HSD and PTD."""

    def __init__(self, seen: dict[str, list[Call]]) -> None:
        modules = {"hsd": gpr_dist.model.hsd, "ptd": gpr_dist.model.ptd}
        self.patches = [patch.object(modules[part], "hybrid_attention", self._keep(calls)) for part, calls in seen.items()]

    @staticmethod
    def _keep(calls: list[Call]) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor, spans: Any, *arguments: Any, **keywords: Any) -> Tensor:
            calls.append(Call((q, k, v), spans, arguments, keywords))
            return hybrid_attention(q, k, v, spans, *arguments, **keywords)

        return attend

    def __enter__(self) -> None:
        for one in self.patches:
            one.start()

    def __exit__(self, *_: object) -> None:
        for one in self.patches:
            one.stop()


def replay(calls: list[Call]) -> list[Tensor]:
    """The calls again, masks and all."""
    for call in calls:
        call.spans.made.clear()
    return [hybrid_attention(*call.tensors, call.spans, *call.arguments, **call.keywords) for call in calls]


def cut(x: Any) -> Any:
    """The same nest of lists and dataclasses, its differentiable tensors replaced by leaves."""
    if isinstance(x, Tensor):
        return x.detach().requires_grad_() if x.requires_grad else x
    if isinstance(x, list | tuple):
        return type(x)(cut(part) for part in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, Batch):
        return dataclasses.replace(x, **{f.name: cut(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


def tensors(x: Any) -> Iterator[Tensor]:
    """The differentiable tensors of such a nest."""
    if isinstance(x, Tensor):
        if x.requires_grad:
            yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors(part)
    elif dataclasses.is_dataclass(x) and not isinstance(x, Batch):
        for f in dataclasses.fields(x):
            yield from tensors(getattr(x, f.name))


def matmul(device: torch.device, precision: str) -> dict:
    """Large square products, about 0.3 s of them on one core."""
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype_of(precision))
    repeats = 50 if precision == "bf16" else 12
    for _ in range(repeats):
        a @ b
    return {"flops": repeats * 2 * size**3}


class ItemHSTU(nn.Module):
    """Our encoder as plain HSTU over items, with the peer's input (items, positions, dropout) and output (unit length)."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        width, length = settings["width"], settings["length"]
        self.items, self.positions = nn.Embedding(settings["num_items"] + 1, width), nn.Embedding(length, width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = settings["dropout"]
        self.hsd = HSD(width, HSDConfig(
            num_layers=settings["num_layers"], num_heads=settings["num_heads"], ffn_multiple=0, dropout=settings["dropout"], score="silu",
            silu_length=length, mask="causal", position="relative", position_buckets=max(32, length), bias_per_head=False,
            token_aware_norm=False, token_aware_ffn=False))

    def forward(self, embedded_TD: Tensor, batch: Batch) -> Tensor:
        """[T, D] of unit length."""
        position_T = torch.arange(len(embedded_TD), device=embedded_TD.device) % self.positions.num_embeddings
        x_TD = dropout(embedded_TD * embedded_TD.shape[1] ** 0.5 + self.positions(position_T), self.dropout, self.training)
        return F.normalize(self.hsd(x_TD, batch)[0], dim=1)


def hstu(settings: dict) -> Steps:
    """Our encoder as HSTU: alone, and steps with the peer's two losses."""
    torch.manual_seed(settings["seed"])
    device, precision = torch.device(settings.get("device", "cpu")), settings["precision"]
    rows, length, width, negatives = (settings[name] for name in ("rows", "length", "width", "num_negatives"))
    model = ItemHSTU(settings).to(device, dtype_of(precision)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    ids_BN, seconds_BN, _ = hstu_input(settings, padding=0)
    item_T, batch = ids_BN.flatten().to(device), item_batch(ids_BN, seconds_BN).to(device)
    inputs_B = torch.arange(rows * length, device=device).view(rows, length)[:, :-1].flatten()
    flops = hstu_flops(rows, length, width, settings["num_layers"])

    def encoder() -> dict:
        optimizer.zero_grad()
        encoded_TD = model(model.items(item_T).detach().requires_grad_(), batch)
        encoded_TD.backward(torch.ones_like(encoded_TD))
        return {"tokens": rows * length, "flops": flops}

    def step(full: bool) -> dict:
        optimizer.zero_grad()
        state_nD, next_n = model(model.items(item_T), batch).index_select(0, inputs_B), item_T[inputs_B + 1]
        loss_of = chunked_softmax if full else partial(sampled_softmax, num_negatives=negatives)
        loss = loss_of(state_nD, model.items.weight, next_n)
        loss.backward()
        optimizer.step()
        return {"tokens": rows * length, "loss": float(loss.detach())}

    return {"encoder": encoder, "full softmax": lambda: step(full=True), "sampled softmax": lambda: step(full=False),
            "matmul": lambda: matmul(device, precision)}


def hstu_flops(rows: int, length: int, width: int, num_layers: int) -> dict[str, float]:
    """Training operations of plain HSTU on full rows, by our convention, and by NVIDIA's: attention at 3.5 times forward, T²/2 pairs."""
    dense = 10.0 * length * width**2  # U V Q K and the output map
    return {"ours": TRAINING_FACTOR * rows * num_layers * (dense + 2 * length * (length + 1) * width),
            "nvidia": rows * num_layers * (3 * dense + 3.5 * 2 * length**2 * width)}


def chunked_softmax(state_nD: Tensor, table_MD: Tensor, next_n: Tensor) -> Tensor:
    """`bench_step_peers.full_softmax`, by our operator."""
    every = torch.arange(len(next_n), device=next_n.device)
    return item_nll(state_nD / TEMPERATURE, F.normalize(table_MD, dim=1), None, every, next_n) / len(next_n)


def sampled_softmax(state_nD: Tensor, table_MD: Tensor, next_n: Tensor, num_negatives: int) -> Tensor:
    """The peer's sampled softmax: every position against its own negatives, an accidental hit left out.

    With a catalogue this small, cosines to all items are less work than fetching a vector for every negative.
    """
    negatives_nS = torch.randint(1, len(table_MD), (len(next_n), num_negatives), device=next_n.device)
    cosines_nM = state_nD @ F.normalize(table_MD, dim=1).T
    logits_nS = cosines_nM.gather(1, torch.cat((next_n[:, None], negatives_nS), 1)).float() / TEMPERATURE
    hit_nS = F.pad(negatives_nS == next_n[:, None], (1, 0))
    return -logits_nS.masked_fill(hit_nS, -5e4).log_softmax(1)[:, 0].mean()


def item_batch(ids_BN: Tensor, seconds_BN: Tensor) -> Batch:
    """Full rows of items, as the encoder wants them; nothing else of the batch is read."""
    rows, length = ids_BN.shape
    total = rows * length
    none, every = torch.zeros(0, dtype=torch.int64), torch.arange(total)
    values = {f.name: none for f in dataclasses.fields(Batch) if f.default is dataclasses.MISSING}
    return Batch(**values | {"offsets_B1": torch.arange(0, total + 1, length), "row_ids_B": torch.arange(rows),
                             "token_type_T": torch.full((total,), int(TokenType.I)), "block_T": every % length,
                             "timestamp_T": seconds_BN.flatten()})


if __name__ == "__main__":
    serve({"gpr": gpr, "gpr_like_peer": gpr_like_peer, "hstu": hstu}, sys.argv[1:])
