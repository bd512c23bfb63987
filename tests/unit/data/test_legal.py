"""Legal codes and their prior against a slow, obvious walk over every eligible ad."""

import numpy as np
import pytest

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import SMOOTHING, LegalCodes
from gpr_dist.errors import ConfigError
from gpr_dist.schema import EVERY_AD

V, L, M = 5, 3, 60


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_offsets_equal_a_walk_over_the_eligible_ads(cache_bytes, prior, counted):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, V, (M, L))
    weight = rng.integers(0, 4, M).astype(float) if prior else None
    groups = [np.sort(rng.choice(M, size, replace=False)).astype(np.int32) for size in (1, 7, 30)]
    eligibility = Eligibility(groups, np.arange(M, dtype=np.int32), M)
    legal = LegalCodes(codes, V, eligibility, weight, cache_bytes)
    for _ in range(3):  # the cache must not change answers
        group_N, items_N = rng.integers(-1, 3, 40), rng.integers(0, M, 40)
        offset = legal.offsets(group_N, codes[items_N], counted)
        for n, (group, item) in enumerate(zip(group_N, items_N, strict=True)):
            shown = eligibility.items(int(group))
            for level in range(L):
                expected = np.zeros(V)
                for i in shown:
                    if (codes[i, :level] == codes[item, :level]).all():
                        expected[codes[i, level]] = expected[codes[i, level]] + weight[i] + SMOOTHING if prior else 1
                own = codes[item, level]
                expected[own] = max(expected[own] - (prior and counted), SMOOTHING if prior else 1)
                np.testing.assert_allclose(np.exp(offset[n, level]), expected, rtol=1e-5)


def test_no_targets_and_too_many_codes():
    eligibility = Eligibility([], np.arange(M, dtype=np.int32), M)
    codes = np.zeros((M, L), np.int64)
    assert LegalCodes(codes, V, eligibility).offsets(np.array([], np.int64), np.zeros((0, L), np.int64)).shape == (0, L, V)
    assert (LegalCodes(codes, V, eligibility).offsets(np.array([EVERY_AD]), codes[:1]) == 0).sum() == L
    with pytest.raises(ConfigError, match=r"data\.softmax"):
        LegalCodes(np.zeros((M, 6), np.int64), 8192, eligibility)
