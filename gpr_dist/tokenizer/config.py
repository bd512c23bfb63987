"""Settings of the tokenizer: how embeddings become semantic IDs."""

import math
from typing import Literal

from pydantic import Field, model_validator

from gpr_dist.config import Config


class RQVAEConfig(Config):
    """Settings of the RQ-VAE stage; used by method rq_vae and rq_kmeans_plus."""

    hidden: tuple[int, ...] = (512,)
    """widths of the encoder's hidden layers; the decoder mirrors them"""
    latent_dim: int | None = Field(None, ge=1)
    """width of the codes of method rq_vae; none = the embeddings' own. rq_kmeans_plus always has the embeddings' own"""
    init: Literal["random", "kmeans"] = "kmeans"
    """codebooks of method rq_vae before training: random, or residual k-means of the first latents"""
    beta: float = Field(0.25, ge=0)
    """weight of the commitment loss (TIGER)"""
    epochs: int = Field(30, ge=0)
    """passes over the fit items"""
    batch_size: int = Field(512, ge=1)
    """items per step over all processes"""
    micro_batch_size: int = Field(256, ge=1)
    """items whose gradient one process computes at once; processes beyond batch_size / micro_batch_size have nothing to do"""
    lr: float = Field(1e-3, gt=0)
    """peak learning rate of encoder and decoder (AdamW), decayed to zero by a cosine"""
    codebook_lr: float = Field(1e-2, gt=0)
    """peak learning rate of the codebooks, which must keep up with the latents that the encoder moves"""
    weight_decay: float = Field(0.0, ge=0)
    """of the encoder and the decoder; codebooks have none"""
    restart_epochs: int = Field(2, ge=0)
    """every so many epochs the codes that few items got restart beside codes that serve theirs badly; 0 = never"""
    restart_share: float = Field(0.5, ge=0, lt=1)
    """few = at most this share of an even split of the items over the level's codes; 0 = none at all (dead codes only)"""


class TokenizerConfig(Config):
    """Settings of the tokenizer fit."""

    method: Literal["rq_kmeans", "rq_vae", "rq_kmeans_plus"] = "rq_kmeans"
    """how the codebooks are fitted: residual k-means; an RQ-VAE; or an RQ-VAE with a residual encoder that starts from residual k-means"""
    num_levels: int = Field(3, ge=1)
    """codes per item (L)"""
    codebook_size: int = Field(256, ge=2)
    """codes per level (V); the paper's team uses 2048, which suits catalogues of millions"""
    iterations: int = Field(25, ge=1)
    """most Lloyd iterations per level"""
    tolerance: float = Field(1e-4, ge=0)
    """a level stops when one iteration lowers its squared error by less than this share"""
    max_fit_items: int = Field(1_000_000, ge=2)
    """items the codebooks are fitted on, drawn at random when the catalogue has more; every item is encoded"""
    kmeans_items_per_code: int | None = Field(512, ge=1)
    """k-means sees at most this many times V of the fit items, the same at all levels; none = all of them. Estimating a
    centroid from n items adds about 1/n to the level's error: 0.2 % at 512"""
    fit_memory_gb: float = Field(8.0, gt=0)
    """GiB of fit items and of their residuals one process keeps in memory (of the GPU, on one); what does not fit into half of
    it each is read again from the map at every pass"""
    rq_vae: RQVAEConfig = RQVAEConfig()
    """of the RQ-VAE stage"""
    seed: int = 0
    """of the sample, of k-means++ and of the RQ-VAE"""
    device: str = "auto"
    """cpu | cuda | cuda:<n> | auto (CUDA where there is one)"""

    @model_validator(mode="after")
    def _semantic_id_fits_int64(self) -> "TokenizerConfig":
        bits = self.num_levels * math.log2(self.codebook_size)
        if bits >= 63:
            raise ValueError(f"codebook_size ** num_levels needs {bits:.0f} bits, a packed semantic ID has 63; lower one of them")
        return self
