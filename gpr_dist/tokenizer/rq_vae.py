"""The RQ-VAE stage (GPR §2, Fig. 3): codebooks, encoder and decoder of a `Quantizer` learn together, by gradient descent.

One loop for RQ-VAE and RQ-Kmeans+, which differ in where they start: quantizer.py says what the encoder is, rq_kmeans.py
where the codebooks begin. Runs on any number of processes: a batch is cut into micro-batches of a fixed size, each process
does its share, and their gradients are added exactly, so 1, 2 or 1000 processes take the same steps. Embeddings are points.py's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.collective import exact_sum, rank, share
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import nearest
from gpr_dist.tokenizer.points import BLOCK_ROWS, Points
from gpr_dist.tokenizer.quantizer import Quantizer

# F fit rows  n rows of a micro-batch or a sample  D embedding dim  K latent dim  L levels  V codes per level  P all parameters, flat
# M micro-batches of this process

SHUFFLED_BLOCKS = 32
"""blocks whose rows are shuffled together: what a memory map must keep in the page cache"""
_SPLIT = 0.05  # of the way from a code to one of its items, where a restarted code begins


class Latents:
    """The latents of fit rows, read like the rows themselves: what residual k-means starts the codebooks of an RQ-VAE from."""

    def __init__(self, quantizer: Quantizer, points: Points) -> None:
        self._quantizer, self._points = quantizer, points
        self.num_rows, self.dim, self.device = points.num_rows, quantizer.codebooks_LVK.shape[2], points.device

    @torch.no_grad()
    def take(self, rows_n: np.ndarray | Tensor) -> Tensor:
        """As Points.take."""
        return self._quantizer.latent(self._points.take(rows_n))


class RQVAELoss(NamedTuple):
    """Means over rows and dimensions, in units of the embeddings' variance: a reconstruction loss of 1 is no better than their mean."""

    reconstruction: Tensor
    """‖e − ê‖²"""
    codebook: Tensor
    """Σ_l ‖sg[r_l] − c_l‖²: moves the codes to what they stand for"""
    commitment: Tensor
    """Σ_l ‖r_l − sg[c_l]‖²: keeps the encoder near the codes"""


class Training(NamedTuple):
    """What happened, the same on every process."""

    losses_E3: np.ndarray
    """mean of each epoch over its rows, columns as in RQVAELoss"""
    num_restarted_L: np.ndarray
    """int64, how many codes of each level restarted, in all epochs together"""


def train_rq_vae(quantizer: Quantizer, points: Points) -> Training:
    """Minimise L = ‖e − ê‖² + Σ_l (‖sg[r_l] − c_l‖² + β‖r_l − sg[c_l]‖²) with AdamW and a cosine (GPR §2; β: TIGER, arXiv:2305.05065).

    Args:
        quantizer: on the points' device, its normalisation and codebooks set; trained in place.
        points: the fit rows; every process has the same quantizer and the same fit rows.
    Raises: TokenizerError when the loss is not finite.
    """
    config, settings = quantizer.config, quantizer.config.rq_vae
    assert quantizer.encoder is not None, config.method
    optimiser = torch.optim.AdamW([
        {"params": [*quantizer.encoder.parameters(), *quantizer.decoder.parameters()], "lr": settings.lr,
         "weight_decay": settings.weight_decay},
        {"params": [quantizer.codebooks_LVK], "lr": settings.codebook_lr, "weight_decay": 0.0},
    ])
    num_steps = settings.epochs * sum(1 for _ in _batches(points.num_rows, config, 0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, num_steps))))
    losses, num_restarted_L = [], torch.zeros(config.num_levels, dtype=torch.int64)
    usage_LV = torch.zeros(quantizer.codebooks_LVK.shape[:2], dtype=torch.int64, device=points.device)
    with tqdm(total=num_steps, desc="train RQ-VAE", unit="step", mininterval=0.5, disable=rank() != 0) as bar:
        for epoch in range(settings.epochs):
            loss_3 = torch.zeros(3, dtype=torch.float64)
            for rows_n in _batches(points.num_rows, config, epoch):
                step_loss_3, step_usage_LV = _accumulate(quantizer, points, rows_n)
                if not bool(step_loss_3.isfinite().all()):
                    raise TokenizerError(f"RQ-VAE loss is not finite in epoch {epoch + 1} at step {bar.n + 1} of {num_steps}; "
                                         f"lower tokenizer.rq_vae.lr ({settings.lr:g}) or .codebook_lr ({settings.codebook_lr:g})")
                optimiser.step()
                schedule.step()
                loss_3 += step_loss_3.cpu() * len(rows_n) / points.num_rows
                usage_LV += step_usage_LV
                bar.set_postfix(epoch=epoch + 1, loss=f"{float(step_loss_3[0]):.4f}", restarted=int(num_restarted_L.sum()), refresh=False)
                bar.update()
            losses.append(loss_3)
            if settings.restart_epochs and (epoch + 1) % settings.restart_epochs == 0 and epoch + 1 < settings.epochs:
                even = points.num_rows * settings.restart_epochs / config.codebook_size
                num_restarted_L += _restart(quantizer, points, usage_LV <= settings.restart_share * even, optimiser, epoch)
                usage_LV.zero_()
    quantizer.zero_grad(set_to_none=True)
    return Training(torch.stack(losses).numpy() if losses else np.zeros((0, 3)), num_restarted_L.numpy())


def rq_vae_loss(quantizer: Quantizer, points_nD: Tensor) -> tuple[RQVAELoss, Tensor]:
    """Losses of normalised embeddings and the codes they got, int64 [n, L].

    ê = decode(z + sg[Σ_l c_l − z]): straight-through on the sum, so that the reconstruction reaches the encoder as if nothing had been
    rounded. It does not reach the codebooks, which learn from the codebook loss alone.
    """
    latent_nK = quantizer.latent(points_nD)
    residual_nK, quantised_nK = latent_nK, torch.zeros_like(latent_nK)
    codebook = commitment = latent_nK.new_zeros(())
    codes = []
    for codebook_VK in quantizer.codebooks_LVK:
        codes_n = nearest(residual_nK.detach(), codebook_VK.detach())[0]
        centroid_nK = nn.functional.embedding(codes_n, codebook_VK)
        codebook = codebook + (residual_nK.detach() - centroid_nK).square().mean()
        commitment = commitment + (residual_nK - centroid_nK.detach()).square().mean()
        residual_nK = residual_nK - centroid_nK.detach()
        quantised_nK = quantised_nK + centroid_nK.detach()
        codes.append(codes_n)
    decoded_nD = quantizer.decode(latent_nK + (quantised_nK - latent_nK).detach())
    return RQVAELoss((points_nD - decoded_nD).square().mean(), codebook, commitment), torch.stack(codes, 1)


def _accumulate(quantizer: Quantizer, points: Points, rows_n: np.ndarray) -> tuple[Tensor, Tensor]:
    """Gradients of one batch, over all processes, into the parameters. Returns: its losses float64 [3], codes used int64 [L, V]."""
    settings = quantizer.config.rq_vae
    parameters = list(quantizer.parameters())
    micro_batches = np.array_split(rows_n, -(-len(rows_n) // settings.micro_batch_size))
    # the sum below is of float64, which holds every count exactly
    usage_LV = torch.zeros(quantizer.codebooks_LVK.shape[:2], dtype=torch.float64, device=points.device)
    parts = []
    for micro in share(len(micro_batches)):
        loss, codes_nL = rq_vae_loss(quantizer, points.take(micro_batches[micro]))
        total = loss.reconstruction + loss.codebook + settings.beta * loss.commitment
        weight = len(micro_batches[micro]) / len(rows_n)
        gradients = torch.autograd.grad(total * weight, parameters)
        parts.append(torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(loss).detach() * weight]))
        ones_n = torch.ones(len(codes_nL), dtype=torch.float64, device=points.device)
        for level, codes_n in enumerate(codes_nL.T):
            usage_LV[level].index_add_(0, codes_n, ones_n)
    num_values = sum(parameter.numel() for parameter in parameters) + 3
    summed_P = exact_sum(torch.stack(parts) if parts else torch.zeros(0, num_values, device=points.device))
    offset = 0
    for parameter in parameters:
        parameter.grad = summed_P[offset:offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
        offset += parameter.numel()
    return summed_P[offset:], exact_sum(usage_LV[None]).long()


def _batches(num_rows: int, config: TokenizerConfig, epoch: int) -> Iterator[np.ndarray]:
    """Every fit row once, in nearly equal batches: blocks shuffled, then the rows of a few blocks; int64, ascending within a batch."""
    rng = np.random.default_rng((config.seed, epoch))
    blocks = rng.permutation(-(-num_rows // BLOCK_ROWS))
    for first in range(0, len(blocks), SHUFFLED_BLOCKS):
        starts = blocks[first:first + SHUFFLED_BLOCKS, None] * BLOCK_ROWS
        rows = (starts + np.arange(BLOCK_ROWS)).reshape(-1)
        rows = rng.permutation(rows[rows < num_rows])
        for rows_n in np.array_split(rows, -(-len(rows) // config.rq_vae.batch_size)):
            yield np.sort(rows_n)


@torch.no_grad()
def _restart(quantizer: Quantizer, points: Points, idle_LV: Tensor, optimiser: torch.optim.Optimizer, epoch: int) -> Tensor:
    """Move idle codes beside codes that leave much error, a small step towards one of their items, so that the two share what one had.

    Items are drawn from random rows in proportion to the squared distance to their code. Restarting on the item itself, instead of
    beside the code, gave more collisions on a validation part (Games embeddings, one seed: RESULTS.md).
    Every process does the same work, so none needs to be told. Returns: codes moved per level, int64 [L], on the CPU.
    """
    config = quantizer.config
    moved_L = torch.zeros(config.num_levels, dtype=torch.int64)
    if not bool(idle_LV.any()):
        return moved_L
    rng = np.random.default_rng((config.seed, config.rq_vae.epochs + epoch))  # a stream of its own beside those of `_batches`
    num_rows = min(points.num_rows, max(config.rq_vae.batch_size, 4 * config.codebook_size))
    rows_n = np.sort(rng.choice(points.num_rows, num_rows, replace=False, shuffle=False))
    residual_nK = quantizer.latent(points.take(rows_n))
    for level, codebook_VK in enumerate(quantizer.codebooks_LVK):
        codes_n, distance_n = nearest(residual_nK, codebook_VK)
        left_nK = residual_nK - codebook_VK[codes_n]
        # the largest of log weight + Gumbel noise are a weighted draw without replacement
        key_n = distance_n.double().log().cpu() + torch.from_numpy(rng.gumbel(size=num_rows))
        drawn = key_n.topk(int((distance_n > 0).sum())).indices.to(points.device)
        drawn = drawn[~idle_LV[level][codes_n[drawn]]]  # beside a code that stays where it is
        idle = idle_LV[level].nonzero()[:len(drawn), 0]
        drawn = drawn[:len(idle)]
        codebook_VK[idle] = codebook_VK[codes_n[drawn]] + _SPLIT * left_nK[drawn]
        for moment in ("exp_avg", "exp_avg_sq"):
            optimiser.state[quantizer.codebooks_LVK][moment][level, idle] = 0
        moved_L[level] = len(idle)
        residual_nK = left_nK
    return moved_L
