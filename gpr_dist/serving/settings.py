"""What a bundle says about requests and about the search: the feature schema, the journey's limits, and the decoding that was evaluated."""

from typing import Literal

from pydantic import Field, model_validator

from gpr_dist.config import Config
from gpr_dist.decoding.ranking import Order
from gpr_dist.decoding.search import SearchConfig
from gpr_dist.errors import ConfigError
from gpr_dist.hashing import TIME_FEATURES
from gpr_dist.model.gpr import GPRConfig


class RequestSettings(Config):
    """How a raw request becomes the tokens that training made of the same events."""

    user_features: tuple[str, ...]
    """categorical fields of a U token, in the model's order; hashed with their name (gpr_dist/hashing.py: feature_id)"""
    env_features: tuple[str, ...]
    """categorical fields of an E token"""
    num_event_user_features: int = Field(0, ge=0)
    """how many of the user features, the last ones, come with every event of the log rather than from a users table"""
    time_features: tuple[Literal[*TIME_FEATURES], ...] = ()
    """env features that are made from the request's time where the request leaves them out"""
    user_tokens: Literal["row", "block", "none"]
    """one U token at the start of the journey, of each request, or none"""
    env_tokens: bool
    """an E token in every request"""
    max_tokens: int = Field(ge=4)
    """most tokens of a journey that the model reads"""
    context_tokens: int = Field(ge=0)
    """most tokens of history before the request's own"""
    max_organic_per_block: int = Field(ge=0)
    """organic events kept before one request, the most recent ones"""
    history_events: int = Field(0, ge=0)
    """events older than the prompt that the model's pointer may repeat, the latest ones; 0 = it reads the prompt only"""
    num_knowledge_vectors: int = Field(0, ge=0)
    """vectors m of external knowledge a request may carry; 0 = the model reads none"""
    knowledge_width: int = Field(0, ge=0)
    """their width E"""
    audience_fields: tuple[str, ...] = ()
    """what the bundle's rules ask about a request (serving/rules.py)"""

    @model_validator(mode="after")
    def _check(self) -> "RequestSettings":
        if self.max_organic_per_block + 3 > self.max_tokens:
            raise ValueError(f"max_organic_per_block={self.max_organic_per_block} leaves no room in max_tokens={self.max_tokens}")
        return self


RANKERS = ("generative", "item head")
Ranker = Literal[*RANKERS, "mix"]


class BundleSettings(Config):
    """The `settings` of bundle.json."""

    requests: RequestSettings
    """from a raw request to tokens"""
    search: SearchConfig
    """how ads are found; its last width is the most ads an answer can have"""
    order: Order = "probability"
    """how the ads found by the search are ordered"""
    ranker: Ranker = "generative"
    """who ranks: the search over semantic IDs, the item head, or both mixed"""
    mix_weights: dict[Literal["generative", "item head"], float] = Field({})
    """shares of the two in a mix; empty = none is known"""
    list_length: int = Field(100, ge=1)
    """ads of each list that are mixed"""
    placements: dict[str, int] = Field({})
    """names of eligibility groups"""
    num_items: int
    catalogue_fingerprint: str

    @property
    def max_k(self) -> int:
        """Most ads an answer can have."""
        width = self.search.width
        return width if isinstance(width, int) else width[-1]

    @model_validator(mode="after")
    def _check(self) -> "BundleSettings":
        if self.order != "probability" and self.search.strategy != "value":
            raise ValueError(f"order={self.order} needs search.strategy=value, which works out the value of every leaf")
        if self.order != "probability" and self.ranker != "generative":
            raise ValueError(f"order={self.order} orders what the search found: it needs ranker=generative, not {self.ranker!r}")
        if self.ranker == "mix" and sum(self.mix_weights.values()) <= 0:
            raise ValueError("ranker=mix needs mix_weights={'generative': ..., 'item head': ...}; launch/evaluate.py with "
                             "compare.mix=[generative, item head] chooses them on the validation split")
        if self.mix_weights and min(self.mix_weights.values()) < 0:
            raise ValueError(f"mix_weights={self.mix_weights} must be >= 0")
        return self


def check_ranker(ranker: Ranker, model: GPRConfig) -> None:
    """Raises: ConfigError when the model cannot rank so."""
    if ranker != "generative" and not model.items.has_head:
        raise ConfigError(f"ranker={ranker!r} needs a model with an item head (model.items.buckets > 0, model.items.head not none); "
                          "this one has none: ranker=generative")
