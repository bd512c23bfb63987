"""Settings of the synthetic ad market."""

from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import Field, model_validator

from gpr_dist.config import Config

DAY_S = 86_400


class LoggingConfig(Config):
    """The production system whose log we read: retrieval that ignores value, rankers that err, then an auction.

    Nothing here changes the truth: users, ads, their click and conversion rates stay the same under every logging policy.
    """

    candidates: int = Field(default=32, ge=2, le=1024)
    """ads retrieved per request, drawn with replacement"""
    need_share: float = Field(default=0.4, ge=0, le=1)
    """share of the candidates that come from the topic production believes the user needs now"""
    taste_share: float = Field(default=0.4, ge=0, le=1)
    """share that comes from the user's long-term topics; the rest is drawn from all eligible ads"""
    belief_accuracy: float = Field(default=0.7, ge=0, le=1)
    """how often that belief is right; otherwise it is one of the long-term topics"""
    max_reach: int = Field(default=12, ge=1, le=1000)
    """most and least retrieved ads differ by this factor, which has nothing to do with their value"""
    ranker_shrink: float = Field(default=0.7, ge=0, le=1)
    """share of the true differences in CTR (in logits) that production's rankers see"""
    ranker_noise: float = Field(default=0.7, ge=0)
    """standard deviation of their error per request and ad, in logits; a constant error per ad, half as large, comes on top"""

    @model_validator(mode="after")
    def _check(self) -> "LoggingConfig":
        if self.need_share + self.taste_share > 1:
            raise ValueError("need_share + taste_share is more than 1")
        return self


class MarketConfig(Config):
    """A synthetic ad market."""

    out: Path
    """folder of the logs, the item, user and targeting tables, and the truth"""
    seed: int = Field(default=0, ge=0)
    """everything follows from it"""
    start: date = date(2026, 1, 1)
    """first day; days, budgets and flights change at 0:00 UTC"""
    num_days: int = Field(default=14, ge=2)
    """days of log"""
    num_users: int = Field(default=4_000, ge=2)
    """users"""
    num_ads: int = Field(default=2_400, ge=4)
    """ads"""
    num_advertisers: int = Field(default=160, ge=2)
    """advertisers; each has a daily budget for all its ads"""
    num_organic: int = Field(default=3_000, ge=1)
    """items of organic content"""
    num_topics: int = Field(default=32, ge=4, le=255)
    """topics of ads, content and needs"""
    dim: int = Field(default=16, ge=2)
    """size of the latent vectors of users, ads and content"""
    num_segments: int = Field(default=6, ge=1, le=60)
    """user segments that ads are targeted at"""
    num_placements: int = Field(default=2, ge=1, le=60)
    """placements (surfaces) that ads are targeted at"""
    flight_days: int = Field(default=2, ge=1)
    """ads start and end at the turn of flights of so many days; groups of eligible ads = flights x segments x placements"""
    events_per_user_day: float = Field(default=7.5, gt=0)
    """mean over users; they differ"""
    session_events: float = Field(default=7.5, ge=1)
    """mean events of a session"""
    request_share: float = Field(default=0.4, gt=0, lt=1)
    """share of the events that are ad requests"""
    need_hours: float = Field(default=8, gt=0)
    """a user's current need may change every so many hours"""
    need_stay: float = Field(default=0.6, ge=0, le=1)
    """and stays with this probability; else the successor of its topic follows, or a long-term topic"""
    need_chain: float = Field(default=0.7, ge=0, le=1)
    """probability of a successor, where the need changes"""
    drift_days: float = Field(default=120, gt=0)
    """median period in which long-term interests turn"""
    taste_weight: float = Field(default=4, ge=0)
    """what long-term interest (cosine of user and ad, -1..1) adds to the click logit"""
    need_weight: float = Field(default=1.8, ge=0)
    """what meeting the current need adds to the click logit; the topic that follows it meets half of it"""
    ctr: float = Field(default=0.01, gt=0, lt=0.5)
    """click rate of a random ad shown to a random user; what production chooses is clicked several times as often"""
    cvr: float = Field(default=0.04, gt=0, lt=0.5)
    """conversions per click of a random ad"""
    slot_effects: tuple[float, ...] = Field(default=(0.0, -0.35, -0.7, -1.1), min_length=1, max_length=100)
    """what each slot adds to the click logit; the slot is drawn at random before the ad is chosen"""
    conversion_delay_hours: float = Field(default=14, gt=0)
    """median time from click to conversion; log-normal"""
    conversion_worth: float = Field(default=2, ge=0)
    """worth of a conversion, in bids, in the true value of an impression"""
    mean_bid: float = Field(default=1.0, gt=0)
    """median bid, money per click"""
    reserve: float = Field(default=0.05, ge=0)
    """least price of a click; every bid is at least that"""
    budget: float = Field(default=5, gt=0)
    """sum of the daily budgets / what the market would spend in a day without them, roughly"""
    logging: LoggingConfig = LoggingConfig()
    """the policy that wrote the log"""
    chunk_requests: int = Field(default=16_384, ge=1)
    """requests held in memory as candidates at a time; the log does not depend on it"""

    @model_validator(mode="after")
    def _check(self) -> "MarketConfig":
        problems = []
        if self.num_advertisers > self.num_ads:
            problems.append(f"num_advertisers={self.num_advertisers} is more than num_ads={self.num_ads}")
        if self.num_groups > 4096:
            problems.append(f"{self.num_groups} eligibility groups (flights x segments x placements) are more than 4096; "
                            "raise flight_days or lower num_segments or num_placements")
        if self.num_topics > min(self.num_ads, self.num_organic):
            problems.append(f"num_topics={self.num_topics} is more than num_ads={self.num_ads} or num_organic={self.num_organic}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def num_flights(self) -> int:
        return -(-self.num_days // self.flight_days)

    @property
    def num_groups(self) -> int:
        return self.num_flights * self.num_segments * self.num_placements

    @property
    def start_s(self) -> int:
        """Seconds since 1970."""
        return int(datetime(self.start.year, self.start.month, self.start.day, tzinfo=UTC).timestamp())

    @property
    def end_s(self) -> int:
        """End of the log; what happens later is not in it."""
        return self.start_s + self.num_days * DAY_S
