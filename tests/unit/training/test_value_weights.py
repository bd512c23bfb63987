"""The weights of a step: mean 1 over everything it holds, however it is split; immature ads left out; missing columns named."""

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from journeys_fixture import ENV_FEATURES, NUM_ITEMS, USER_FEATURES, random_journeys, write_split
from random_batches import empty_batch, random_batch

from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.objectives.vaft import VaftConfig, ad_worth, vaft_weights
from gpr_dist.schema import Batch
from gpr_dist.training.loop import sample_targets
from gpr_dist.training.value_weights import ValueWeights, open_value_weights

ALL = torch.tensor([False, True, True])
FOREVER = 2**62


class OneRank:
    rank, world_size = 0, 1

    def all_reduce(self, values):
        return values.clone()


class ManyRanks:
    """One rank of several that are threads."""

    def __init__(self, barrier: threading.Barrier, given: list) -> None:
        self.barrier, self.given = barrier, given

    def all_reduce(self, values):
        self.given.append(values)
        self.barrier.wait(10)
        total = sum(self.given[-self.barrier.parties:])
        self.barrier.wait(10)
        return total


def batch_of(seed: int) -> Batch:
    """A random batch whose ads were shown, clicked or bought, with a time and logged probabilities."""
    batch, g = random_batch(seed), torch.Generator().manual_seed(seed)
    num_targets = len(batch.target_item_N)
    return dataclasses.replace(batch, target_action_N=torch.randint(2, 5, (num_targets,), generator=g),
                               target_pctr_N=torch.rand(num_targets, generator=g), target_pcvr_N=torch.rand(num_targets, generator=g),
                               target_time_N=torch.arange(num_targets) + 1000 * seed)


def step(*seeds: int) -> list[Batch]:
    return [batch_of(seed) if seed else dataclasses.replace(empty_batch(), target_time_N=torch.zeros(0, dtype=torch.int64))
            for seed in seeds]


def weights_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.target_weight_N for batch in batches])


@pytest.mark.parametrize("weights", ["raw", "clipped", "ones"])
def test_the_mean_weight_of_a_step_is_1(weights):
    batches, metrics = ValueWeights(VaftConfig(weights=weights), ALL, FOREVER)(OneRank(), step(1, 2, 0, 3))
    weight_N = weights_of(batches)
    assert weight_N.dtype == torch.float32 and float(weight_N.double().mean()) == pytest.approx(1, abs=1e-6)
    assert weight_N.min() >= 0 and len(batches) == 4 and len(batches[2].target_weight_N) == 0
    assert sum(metrics[f"vaft/weight_frac/{action}"] for action in ("impression", "click", "conversion")) == pytest.approx(1)
    assert (weight_N.std() == 0) == (weights == "ones")
    if weights == "ones":
        assert weight_N.eq(1).all()  # exactly: the loss keeps its bits


def test_the_means_include_the_step_and_then_fade():
    config, weighing = VaftConfig(memory=0.5), ValueWeights(VaftConfig(memory=0.5), ALL, FOREVER)
    columns = []
    for seeds in ((1, 2), (3,)):
        batches, metrics = weighing(OneRank(), step(*seeds))
        kind_N = torch.cat([b.target_action_N for b in batches]) - 2
        worth_N = torch.cat([ad_worth(b.target_action_N, b.target_value_N, b.target_pctr_N, b.target_pcvr_N, ALL) for b in batches])
        columns = [(kind, worth, weight / 2) for kind, worth, weight in columns] + [
            (kind, worth, 1.0) for kind, worth in zip(kind_N.tolist(), worth_N.tolist(), strict=True) if not math.isnan(worth)]
        means = [sum(worth * w for kind, worth, w in columns if kind == a) / sum(w for kind, _, w in columns if kind == a)
                 for a in range(3)]
        assert weighing.means.mean_A.tolist() == pytest.approx(means, rel=1e-9)
        unscaled = vaft_weights(kind_N + 2, worth_N, torch.tensor(means, dtype=torch.float64), config)
        torch.testing.assert_close(weights_of(batches).double(), unscaled / unscaled.mean(), rtol=1e-6, atol=0)
        assert metrics["vaft/mean_worth/click"] == pytest.approx(means[1])
        assert metrics["vaft/unknown_frac"] == pytest.approx(float(worth_N.isnan().double().mean())) and metrics["vaft/unknown_frac"] > 0


def test_a_step_is_weighed_alike_however_it_is_split():
    alone, metrics = ValueWeights(VaftConfig(), ALL, 2005)(OneRank(), step(1, 2, 3))
    barrier, given, shares = threading.Barrier(3), [], ((1,), (0,), (2, 3))
    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(lambda seeds: ValueWeights(VaftConfig(), ALL, 2005)(ManyRanks(barrier, given), step(*seeds)), shares))
    torch.testing.assert_close(torch.cat([weights_of(batches) for batches, _ in ranks]), weights_of(alone), rtol=1e-6, atol=0)
    assert all(found == pytest.approx(metrics) for _, found in ranks) and metrics["vaft/immature_targets"] > 0


def test_a_resumed_state_gives_the_same_weights():
    straight, resumed = (ValueWeights(VaftConfig(), ALL, FOREVER) for _ in range(2))
    straight(OneRank(), step(1, 2))
    resumed.load_state_dict(straight.state_dict())
    again = [weighing(OneRank(), step(3, 4)) for weighing in (straight, resumed)]
    fresh = ValueWeights(VaftConfig(), ALL, FOREVER)(OneRank(), step(3, 4))
    assert weights_of(again[0][0]).equal(weights_of(again[1][0])) and again[0][1] == again[1][1]
    assert not weights_of(again[0][0]).equal(weights_of(fresh[0]))


def test_immature_ads_are_left_out_and_counted():
    before = step(1, 2)
    last = int(before[1].target_time_N[3])  # the second batch's are later, all but four of them too late
    batches, metrics = ValueWeights(VaftConfig(), ALL, last)(OneRank(), step(1, 2))
    assert len(batches[0].target_time_N) == len(before[0].target_time_N) and batches[1].target_time_N.tolist() == [2000, 2001, 2002, 2003]
    assert metrics["vaft/immature_targets"] == len(before[1].target_time_N) - 4
    assert float(weights_of(batches).double().mean()) == pytest.approx(1, abs=1e-6)
    nothing, metrics = ValueWeights(VaftConfig(), ALL, -1)(OneRank(), step(1, 2))
    assert not len(weights_of(nothing)) and sum(batch.num_targets for batch in nothing) == 0
    assert metrics["vaft/immature_targets"] == sum(len(batch.target_time_N) for batch in before)


def test_worthless_ads_have_no_weight_in_raw_mode():
    batches = [dataclasses.replace(batch, target_value_N=torch.zeros_like(batch.target_value_N)) for batch in step(1)]
    assert not weights_of(ValueWeights(VaftConfig(weights="raw"), ALL, FOREVER)(OneRank(), batches)[0]).any()


def test_sampled_targets_keep_their_weights():
    [batch], _ = ValueWeights(VaftConfig(), ALL, FOREVER)(OneRank(), step(1))
    batch.target_value_N = batch.target_weight_N.clone()
    kept = sample_targets(batch, 0.5, seed=1)
    assert 0 < len(kept.target_weight_N) < len(batch.target_weight_N) and kept.target_weight_N.equal(kept.target_value_N)


# ------------------------------------------------------------------------------------------------ what a split logs

def split(folder, **columns):
    """A split whose ads have these functions of the columns, e.g. pctr=lambda ads: NaN everywhere."""
    journeys = random_journeys(40, 1)
    for name, change in columns.items():
        lists = journeys.column(name)
        values = pa.array(change(lists.flatten().to_numpy(), journeys.column("action").flatten().to_numpy()), lists.type.value_type)
        changed = pa.ListArray.from_arrays(lists.offsets, values)
        journeys = journeys.set_column(journeys.schema.get_field_index(name), name, changed)
    write_split(folder, journeys)
    return ShardReader(folder)


def nothing(values, _):
    return values * math.nan


def test_probabilities_divide_where_they_are_logged(tmp_path):
    weighing = open_value_weights(OneRank(), split(tmp_path / "all"), VaftConfig(weights="raw"))
    assert weighing._divided_A.tolist() == [False, True, True] and "taken alone" not in weighing.made_of
    weighing = open_value_weights(OneRank(), split(tmp_path / "pctr", pcvr=nothing), VaftConfig())
    assert weighing._divided_A.tolist() == [False, True, False] and "conversions have no pctr and pcvr" in weighing.made_of
    weighing = open_value_weights(OneRank(), split(tmp_path / "none", pctr=nothing), VaftConfig())
    assert weighing._divided_A.tolist() == [False, False, False] and "clicks have no pctr" in weighing.made_of
    only_conversions = split(tmp_path / "rare", pctr=lambda values, actions: [v if a == 4 else math.nan for v, a in zip(values, actions,
                                                                                                                  strict=True)])
    assert open_value_weights(OneRank(), only_conversions, VaftConfig())._divided_A.tolist() == [False, False, True]


def test_missing_columns_are_named(tmp_path):
    without_value = split(tmp_path / "value", value=nothing)
    for weights in ("raw", "clipped"):
        with pytest.raises(DataError, match=r"needs the column value .* pctr and pcvr .* logs no value: .*build_data\.py.*weights=ones"):
            open_value_weights(OneRank(), without_value, VaftConfig(weights=weights))
    assert "weights of 1" in open_value_weights(OneRank(), without_value, VaftConfig(weights="ones")).made_of
    for name, missing in (("pctr", "needs pctr of every click"), ("pcvr", "needs pctr and pcvr of every conversion")):
        with pytest.raises(DataError, match=rf"{missing} beside its value.*clipped"):
            open_value_weights(OneRank(), split(tmp_path / name, **{name: nothing}), VaftConfig(weights="raw"))


def test_a_maturity_longer_than_the_split_is_refused(tmp_path):
    reader = split(tmp_path / "split")
    span = reader.manifest.last_timestamp - reader.manifest.first_timestamp
    with pytest.raises(ConfigError, match=f"maturity_seconds={span} leaves no target"):
        open_value_weights(OneRank(), reader, VaftConfig(maturity_seconds=span))
    assert open_value_weights(OneRank(), reader, VaftConfig(maturity_seconds=span - 1))


def test_a_target_has_the_time_of_its_own_ad(tmp_path):
    """Found again by item and action among the row's ads: for head j >= 1 it is a later one than the request's."""
    journeys = random_journeys(30, 2)
    write_split(tmp_path, journeys)
    codes = torch.zeros(NUM_ITEMS, 3, dtype=torch.int64).numpy()
    assert len(USER_FEATURES) and len(ENV_FEATURES)
    rows, later = journeys.to_pylist(), 0
    for batch in iter_once(tmp_path, LoaderConfig(micro_batch_tokens=200), World(0, 1), codes, 4):
        for n, request in enumerate(batch.target_request_N.tolist()):
            row = rows[int(batch.row_ids_B[batch.request_row_R[request]])]
            start, head = int(batch.request_time_R[request]), int(batch.target_head_N[n])
            ads = [(t, i) for t, i, kind in zip(row["timestamp"], row["item"], row["token_type"], strict=True) if kind == 3]
            assert (int(batch.target_time_N[n]), int(batch.target_item_N[n])) in ads
            first = next(k for k, (t, _) in enumerate(ads) if t == start)
            if head:
                assert (int(batch.target_time_N[n]), int(batch.target_item_N[n])) == ads[first + head]
                later += int(batch.target_time_N[n]) > start
    assert later > 20 and pc.sum(journeys.column("num_lookahead")).as_py() > 0
