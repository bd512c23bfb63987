"""The fitted tokenizer's numbers: normalise → encoder → one nearest code per level on the residuals → decoder.

One module for the three methods: RQ-Kmeans has neither encoder nor decoder, RQ-VAE has both, RQ-Kmeans+ has both as residuals whose last
layer starts at zero, so that it starts as RQ-Kmeans (GPR §2, Fig. 3). Fitting it is rq_kmeans.py's and rq_vae.py's, what the codes are
for and how they are stored semantic_ids.py's.
"""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.collective import gather_shares, map_blocks, rank, share, together
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import nearest, resolve_device
from gpr_dist.tokenizer.points import to_float32

# N items  n items of a chunk  D embedding dim  K latent dim (of the codes)  L levels  V codes per level

READ_ROWS = 8192
"""rows of a memory map a thread holds in memory at once; fixed, so that the codes do not depend on the number of threads and processes"""


class Quantizer(nn.Module):
    """Embeddings to codes and back. Parameters are read-only once fitted; `codebooks_LVK` are what the codes mean."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        """Args: dim: of the embeddings. Zero, or random from `config.seed`, until the fit or `from_tensors` sets it."""
        super().__init__()
        self.config, self.dim = config, dim
        latent_dim = (config.rq_vae.latent_dim or dim) if config.method == "rq_vae" else dim
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.codebooks_LVK = nn.Parameter(torch.zeros(config.num_levels, config.codebook_size, latent_dim))
        self.encoder = self.decoder = None
        if config.method != "rq_kmeans":
            widths = (dim, *config.rq_vae.hidden, latent_dim)
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(config.seed)
                self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
                nn.init.uniform_(self.codebooks_LVK, -1 / config.codebook_size, 1 / config.codebook_size)
            if self.residual:
                for mlp in (self.encoder, self.decoder):
                    nn.init.zeros_(mlp[-1].weight)
                    nn.init.zeros_(mlp[-1].bias)

    @property
    def residual(self) -> bool:
        """Whether encoder and decoder add to their input."""
        return self.config.method == "rq_kmeans_plus"

    def normalise(self, embeddings_nD: Tensor) -> Tensor:
        """Mean 0 and mean variance 1 over the fit items, one scale for all dimensions: distances keep their order."""
        return (embeddings_nD - self.mean_D) / self.scale

    def latent(self, normalised_nD: Tensor) -> Tensor:
        """What is quantised: [n, K]."""
        if self.encoder is None:
            return normalised_nD
        encoded_nK = self.encoder(normalised_nD)
        return normalised_nD + encoded_nK if self.residual else encoded_nK

    def decode(self, quantised_nK: Tensor) -> Tensor:
        """Normalised embeddings the sums of centroids stand for: [n, D]."""
        if self.decoder is None:
            return quantised_nK
        decoded_nD = self.decoder(quantised_nK)
        return quantised_nK + decoded_nD if self.residual else decoded_nD

    @torch.no_grad()
    def assign(self, latent_nK: Tensor) -> Tensor:
        """z_l = argmin_k ‖R^l - c^l_k‖, R^{l+1} = R^l - c^l_{z_l}: int64 [n, L]."""
        codes, residual_nK = [], latent_nK
        for codebook_VK in self.codebooks_LVK:
            codes.append(nearest(residual_nK, codebook_VK)[0])
            residual_nK = residual_nK - codebook_VK[codes[-1]]
        return torch.stack(codes, 1)

    def encode(self, embeddings_ND: np.ndarray, all_processes: bool = False) -> np.ndarray | None:
        """Codes of every row: int32 [N, L], read from a memory map block by block, on the configured device.

        Args: all_processes: every process of torch.distributed calls it, encodes a contiguous share, and rank 0 gets all codes, the
            others None. Else whoever calls it works alone.
        Raises: TokenizerError for a wrong dimension and for values that are not finite; with `all_processes` on all of them.
        """
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != self.dim:
            raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}, the tokenizer needs [items, {self.dim}]; "
                                 "encode with embeddings of the same kind as those it was fitted on")
        num_items, device = len(embeddings_ND), resolve_device(self.config.device)
        self.to(device)
        blocks = range(-(-num_items // READ_ROWS))
        blocks = share(len(blocks)) if all_processes else blocks
        first, stop = (min(block * READ_ROWS, num_items) for block in (blocks.start, blocks.stop))
        codes_nL = torch.empty(stop - first, self.config.num_levels, dtype=torch.int32)

        @torch.no_grad()
        def encode_block(lo: int) -> int:
            rows_nD = torch.from_numpy(finite(embeddings_ND[lo:min(lo + READ_ROWS, stop)], lo)).to(device)
            codes_nL[lo - first:lo - first + len(rows_nD)] = self.assign(self.latent(self.normalise(rows_nD)))
            return len(rows_nD)

        with together() if all_processes else nullcontext(), tqdm(total=len(codes_nL), desc="encode items", unit="item", unit_scale=True,
                                                                  mininterval=0.5, disable=all_processes and rank() != 0) as bar:
            for done in map_blocks(encode_block, range(first, stop, READ_ROWS), device):
                bar.update(done)
        codes = gather_shares(codes_nL, num_items, READ_ROWS) if all_processes else codes_nL
        return None if codes is None else codes.numpy()

    @torch.no_grad()
    def reconstruct(self, codes_nL: np.ndarray, num_levels: int | None = None) -> np.ndarray:
        """Embeddings the codes stand for, by the first `num_levels` of them (none = all): float32 [n, D]."""
        codes_nL = torch.from_numpy(np.asarray(codes_nL, np.int64)).to(self.codebooks_LVK.device)
        levels = range(self.config.num_levels if num_levels is None else num_levels)
        quantised_nK = sum(self.codebooks_LVK[level][codes_nL[:, level]] for level in levels)
        return (self.decode(quantised_nK) * self.scale + self.mean_D).cpu().numpy()

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything fitted, by name, for safetensors."""
        return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.state_dict().items()}

    @property
    def fingerprint(self) -> str:
        """16 hex digits of sha256 over everything fitted: what the codes mean."""
        digest = hashlib.sha256()
        for name, array in sorted(self.tensors().items()):
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_tensors(cls, config: TokenizerConfig, tensors: Mapping[str, np.ndarray], where: str) -> "Quantizer":
        """Inverse of `tensors`. Raises: TokenizerError naming what does not fit the settings. Args: where: the file, for messages."""
        quantizer = cls(config, tensors["mean_D"].shape[0]) if "mean_D" in tensors else None
        expected = {name: tuple(tensor.shape) for name, tensor in quantizer.state_dict().items()} if quantizer else {"mean_D": ("D",)}
        if expected != (found := {name: array.shape for name, array in tensors.items()}):
            raise TokenizerError(f"{where} holds tensors {found}, its settings need {expected}; restore the bundle or fit it again")
        quantizer.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})
        return quantizer


def finite(rows: np.ndarray, first_row: int) -> np.ndarray:
    """A float32 copy. Raises: TokenizerError naming the first row that is not finite."""
    rows = to_float32(rows).numpy()
    good = np.isfinite(rows.sum(1))
    if not good.all():
        bad = int(np.argmin(good))
        raise TokenizerError(f"embedding of item {first_row + bad} is not finite ({int((~good).sum())} of {len(rows)} rows read with it); "
                             "repair the embeddings")
    return rows


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
