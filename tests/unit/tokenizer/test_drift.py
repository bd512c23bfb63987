"""Drift: items like the training items raise no alarm, other items do; like is compared with like."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.drift import DriftConfig, DriftReport, measure_drift
from gpr_dist.tokenizer.drift_page import drift_page, format_drift, write_drift
from gpr_dist.tokenizer.fit import fit_tokenizer

N, D = 4000, 6
CENTRES = np.random.default_rng(9).normal(size=(12, D)) * 3


def draw_items(count, seed, centres=CENTRES, noise=1.0):
    random = np.random.default_rng(seed)
    return (centres[random.integers(len(centres), size=count)] + noise * random.normal(size=(count, D))).astype(np.float32)


@pytest.fixture(scope="module")
def training():
    return draw_items(N, 0)


@pytest.fixture(scope="module")
def bundle(training):
    return fit_tokenizer(training, TokenizerConfig(num_levels=3, codebook_size=12, device="cpu"), "catalogue")


def values(report):
    return {(m.name, m.level): m for m in report.measures}


@pytest.mark.parametrize("count", [60, 700, 3900, 9000])
@pytest.mark.parametrize("stored", [True, False])
def test_items_of_the_same_kind_raise_no_alarm_however_many(bundle, training, count, stored):
    report = measure_drift(bundle, draw_items(count, 1), DriftConfig(), None if stored else training)
    assert report.alarms == (), format_drift(report)
    assert report.source == ("stored" if stored else "embeddings")
    assert report.sample_size == min(count, N // 2)
    collision = values(report)["collision", None]
    assert abs(collision.z) < 4 and collision.training < bundle.report.collision, "a sample collides less than the whole"


@pytest.mark.parametrize(("items", "names"), [
    (draw_items(800, 2, CENTRES + 9), {"far from its code", "error left", "perplexity", "usage shift"}),
    (draw_items(800, 2, CENTRES[:1]), {"perplexity", "usage shift", "collision", "CUR"}),
    (np.repeat(draw_items(20, 2), 40, axis=0), {"collision"}),
    (draw_items(800, 2, noise=3.0), {"far from its code", "error left"}),
], ids=["moved", "one kind", "repeated", "noisy"])
def test_items_of_another_kind_raise_their_alarms(bundle, items, names):
    report = measure_drift(bundle, items, DriftConfig())
    raised = {measure.name for measure in report.measures if measure.alarm}
    assert names <= raised, format_drift(report)
    assert {alarm.found.split(":")[0].lower() for alarm in report.alarms} == {name.lower() for name in raised}
    assert "ALARM" in format_drift(report)


def test_the_stored_statistics_are_those_of_the_training_embeddings(bundle, training):
    items = draw_items(500, 3)
    stored, measured = values(measure_drift(bundle, items, DriftConfig())), values(measure_drift(bundle, items, DriftConfig(), training))
    assert stored.keys() == measured.keys()
    for key, value in stored.items():
        assert value.new == pytest.approx(measured[key].new, rel=1e-6) and value.training == pytest.approx(measured[key].training, rel=1e-6)
    assert stored["PAS", None].z is None and measured["PAS", None].z is not None


def test_numbers_of_todays_items_equal_brute_force(bundle, training):
    items = draw_items(500, 4)
    report = measure_drift(bundle, items, DriftConfig(num_examples=5), training)
    found, codes = values(report), bundle.quantizer.encode(items)
    assert found["collision", None].new == pytest.approx(1 - len({tuple(c) for c in codes.tolist()}) / 500)
    variance = np.square(training - training.mean(0)).sum(1).mean()
    for level in range(3):
        assert found["CUR", level + 1].new == pytest.approx(len(set(codes[:, level].tolist())) / 12)
        error = np.square(items - bundle.quantizer.reconstruct(codes, level + 1)).sum(1).mean() / variance
        assert found["error left", level + 1].new == pytest.approx(error, rel=1e-4)
        of_training = np.linalg.norm(training - bundle.quantizer.reconstruct(bundle.codes_NL, level + 1), axis=1)
        of_items = np.linalg.norm(items - bundle.quantizer.reconstruct(codes, level + 1), axis=1)
        far = (of_items > np.quantile(of_training, 0.99)).mean()
        assert found["far from its code", level + 1].new == pytest.approx(far, abs=1e-9)
    assert [item.row for item in report.farthest] == np.argsort(-of_items)[:5].tolist()
    usage = np.array(report.usage)
    assert usage.sum(0) == pytest.approx([1, 1]) and np.all(np.diff(usage[:, 0]) <= 0)


def test_on_an_old_id_is_judged_by_training_items_that_see_only_the_others(bundle, training):
    """A copy of a training item is always on an old ID; a sampled training item only if it collides with one outside the sample."""
    copies = measure_drift(bundle, training[:300], DriftConfig(), training)
    measure = values(copies)["on an old semantic ID", None]
    assert measure.new > 0.9 > measure.training, "0.9: the other training items, 300 of 4000 are in the sample"
    random, codes = np.random.default_rng(0), bundle.codes_NL
    expected = []
    for _ in range(20):
        rows = random.choice(N, 300, replace=False)
        rest = {tuple(c) for c in np.delete(codes, rows, axis=0).tolist()}
        expected.append(np.mean([tuple(c) in rest for c in codes[rows].tolist()]))
    assert measure.training == pytest.approx(np.mean(expected), abs=4 * np.std(expected) / 20**0.5)
    assert measure.spread == pytest.approx(np.std(expected), rel=0.8)


def test_appended_items_are_not_training_items(bundle, training):
    grown = bundle.append(draw_items(500, 5, CENTRES + 9), "grown")
    items = draw_items(300, 6)
    assert measure_drift(grown, items, DriftConfig(), training).measures == measure_drift(bundle, items, DriftConfig(), training).measures


def test_files_are_whole_escaped_and_repeatable(bundle, training, tmp_path):
    items = draw_items(50, 7)
    table = pa.table({"item_id": [f"id-{i}" for i in range(50)], "text": ["<script>"] * 50})
    report = write_drift(tmp_path, bundle, items, DriftConfig(), training, table)
    page = (tmp_path / "drift.html").read_text()
    assert DriftReport.model_validate(json.loads((tmp_path / "drift.json").read_text())) == report
    assert "<script" not in page and "&lt;script&gt;" in page and len(page) < 1e6
    assert page == drift_page(measure_drift(bundle, items, DriftConfig(), training, table))
    assert report.farthest[0].item_id == f"id-{report.farthest[0].row}"


def test_one_item_is_enough(bundle):
    assert measure_drift(bundle, draw_items(1, 8), DriftConfig()).num_new == 1


def test_wrong_inputs_are_one_readable_error(bundle, training):
    with pytest.raises(TokenizerError, match="at least one embedding"):
        measure_drift(bundle, training[:0], DriftConfig())
    with pytest.raises(TokenizerError, match="embeddings have shape"):
        measure_drift(bundle, training[:, :2], DriftConfig())
    with pytest.raises(TokenizerError, match="not finite"):
        measure_drift(bundle, np.full((3, D), np.nan, np.float32), DriftConfig())
    with pytest.raises(TokenizerError, match=r"10 training embeddings, .* was fitted on 4,000 items"):
        measure_drift(bundle, training[:5], DriftConfig(), training[:10])
    with pytest.raises(TokenizerError, match="encode to the codes"):
        measure_drift(bundle, training[:5], DriftConfig(), training[::-1])
    with pytest.raises(TokenizerError, match="not measured at its fit"):
        measure_drift(replace(bundle, report=None), training[:5], DriftConfig())
