"""The tokenizer report against slow, obvious versions; alarms that fire and alarms that do not."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.tokenizer.metrics import measure
from gpr_dist.tokenizer.report import Report, ReportConfig, measure_bundle, read_embeddings
from gpr_dist.tokenizer.report_page import format_text, report_page, write_report

N, D, L, V = 400, 4, 3, 6
QUIET = ReportConfig(min_cur=0, min_perplexity_frac=0, max_code_share=1, max_collision=1, min_error_drop=0, max_group=N)


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(N, D)).astype(np.float32)
    embeddings[:30] = embeddings[30]  # duplicates
    kinds = (random.random(N) < 0.4).astype(np.uint8)
    items = pa.table({"item_id": [f"id-{i}" for i in range(N)], "kind": kinds, "text": [f"<script>text {i}</script>" for i in range(N)]})
    bundle = fit_tokenizer(embeddings, TokenizerConfig(num_levels=L, codebook_size=V, device="cpu"), "catalogue")
    return bundle, embeddings, items, random.integers(0, 50, N).astype(float)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_both_sets_equal_brute_force(case):
    bundle, embeddings, items, shown = case
    report = measure_bundle(bundle, embeddings, items, QUIET, shown)
    ads = items["kind"].to_numpy() == 1
    variance = np.square(embeddings - embeddings.mean(0)).sum(1).mean()
    assert [each.name for each in report.sets] == ["all items", "ads"]
    for each, keep in zip(report.sets, (np.ones(N, bool), ads), strict=True):
        codes, vectors = bundle.codes_NL[keep], embeddings[keep]
        counts = Counter(map(tuple, codes.tolist()))
        size = np.array([counts[tuple(row)] for row in codes.tolist()])
        assert (each.num_items, each.num_distinct, each.largest_group) == (keep.sum(), len(counts), max(counts.values()))
        assert each.collision == pytest.approx(1 - len(counts) / keep.sum())
        assert each.not_alone_frac == pytest.approx((size > 1).mean())
        assert each.shown_not_alone_frac == pytest.approx(shown[keep][size > 1].sum() / shown[keep].sum())
        assert each.duplicate_frac == pytest.approx(1 - len(np.unique(vectors, axis=0)) / keep.sum())
        pairs = [cosine(vectors[i], vectors[j]) for i, j in combinations(range(len(codes)), 2) if (codes[i] == codes[j]).all()]
        assert each.pas == pytest.approx(np.mean(pairs))
        assert sum(ids for ids, _ in each.group_sizes.values()) == len(counts)
        assert sum(on for _, on in each.group_sizes.values()) == keep.sum()
        assert each.group_sizes["3-4"] == (sum(n in (3, 4) for n in counts.values()), sum(n for n in counts.values() if n in (3, 4)))
        for level, found in enumerate(each.levels):
            used = Counter(codes[:, level].tolist())
            below = defaultdict(set)
            for row in codes.tolist():
                below[tuple(row[:level])].add(row[level])
            children = sorted(len(x) for x in below.values())
            entropy = -sum(n / len(codes) * np.log2(n / len(codes)) for n in used.values())
            assert (found.cur, found.dead_codes) == (len(used) / V, V - len(used))
            assert found.perplexity == pytest.approx(2**entropy)
            assert found.largest_share == max(used.values()) / len(codes) and used[found.largest_code] == max(used.values())
            assert list(found.usage) == sorted(used.values(), reverse=True) + [0] * found.dead_codes
            assert found.prefixes == len({tuple(row[:level + 1]) for row in codes.tolist()})
            assert found.children == (children[0], np.median(children), pytest.approx(np.mean(children)), children[-1])
            assert sum(found.children_sizes.values()) == len(children)
            left = np.square(vectors - bundle.quantizer.reconstruct(codes, level + 1)).sum(1).mean() / variance
            assert found.error_left == pytest.approx(left, rel=1e-4)


def test_groups_are_the_largest_then_others_none_twice(case):
    bundle, embeddings, items, shown = case
    report = measure_bundle(bundle, embeddings, items, ReportConfig(num_groups=6, num_examples=3), shown)
    counts = Counter(map(tuple, bundle.codes_NL.tolist()))
    assert [g.num_items for g in report.largest_groups] == sorted(counts.values(), reverse=True)[:6]
    listed = [g.semantic_id for g in (*report.largest_groups, *report.most_shown_groups, *report.random_groups)]
    assert len(listed) == len(set(listed)) == 12
    times = {semantic_id: shown[(bundle.codes_NL == semantic_id).all(1)].sum() for semantic_id, n in counts.items() if n > 1}
    others = sorted((times[x] for x in times if x not in listed[:6]), reverse=True)
    assert [g.shown for g in report.most_shown_groups] == others[:3]
    first = report.largest_groups[0]
    members = np.flatnonzero((bundle.codes_NL == first.semantic_id).all(1))
    assert first.num_ads == (items["kind"].to_numpy()[members] == 1).sum()
    assert first.distinct_embeddings == len(np.unique(embeddings[members], axis=0))
    assert first.similarity == pytest.approx(np.mean([cosine(embeddings[i], embeddings[j]) for i, j in combinations(members, 2)]))
    assert [x.index for x in first.examples] == sorted(members, key=lambda i: (-shown[i], i))[:3]
    assert first.examples[0].item_id == f"id-{first.examples[0].index}"


def test_without_embeddings_or_counts_what_needs_them_is_none(case):
    bundle, embeddings, items, _ = case
    report = measure_bundle(bundle, None, items, QUIET)
    every = report.sets[0]
    assert (every.pas, every.duplicate_frac, every.shown_not_alone_frac, every.levels[0].error_left) == (None, None, None, None)
    assert report.largest_groups[0].similarity is None and report.most_shown_groups == ()
    assert "Reconstruction error" not in report_page(report) and "PAS" not in format_text(report)
    some = measure_bundle(bundle, embeddings[:200], items, QUIET)  # appended items have no embeddings here
    assert some.num_embedded == 200 and some.sets[0].pas is not None and some.sets[0].collision == every.collision


def test_a_good_tokenizer_raises_no_alarm(case):
    bundle, embeddings, items, _ = case
    report = measure_bundle(bundle, embeddings, items, QUIET)
    assert report.alarms == () and "ALARM" not in format_text(report) and "No alarms" in report_page(report)


@pytest.mark.parametrize(("threshold", "found"), [
    ({"min_cur": 1.0}, "dead"), ({"min_perplexity_frac": 1.0}, "perplexity"), ({"max_code_share": 0.01}, "holds"),
    ({"max_collision": 0.05}, "Collision is"), ({"max_group": 3}, "largest group"),
    ({"min_error_drop": 0.99}, "lowers the reconstruction error only"),
])
def test_each_threshold_raises_its_alarm(case, threshold, found):
    bundle, embeddings, items, _ = case
    codes = bundle.codes_NL.copy()
    codes[codes[:, 1] == 0, 1] = 1  # a dead code; embeddings of other codes are refused, so measured without them unless needed
    if "min_error_drop" not in threshold:
        bundle, embeddings = replace(bundle, codes_NL=codes), None
    alarms = measure_bundle(bundle, embeddings, items, QUIET.model_copy(update=threshold)).alarms
    assert alarms and all(found in alarm.found and alarm.action for alarm in alarms)


def test_a_collapsed_codebook_raises_alarms_with_the_default_thresholds():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(500, 3)).astype(np.float32) * 1e-3
    embeddings[:40] += random.normal(size=(40, 3)) * 1e3  # outliers take all codes of the first level
    items = pa.table({"item_id": [str(i) for i in range(500)], "kind": np.zeros(500, np.uint8), "text": [""] * 500})
    bundle = fit_tokenizer(embeddings, TokenizerConfig(num_levels=2, codebook_size=32, device="cpu"), "catalogue")
    report = measure_bundle(bundle, embeddings, items, ReportConfig())
    found = " ".join(alarm.found for alarm in report.alarms)
    assert "Level 1 is used as if it had" in found and "of level 1 holds" in found
    assert format_text(report).startswith("ALARM Level 1") and len(report.sets) == 1


def test_written_files_are_whole_escaped_and_repeatable(case, tmp_path):
    bundle, embeddings, items, shown = case
    report = write_report(tmp_path, bundle, embeddings, items, shown_N=shown)
    page, content = (tmp_path / "report.html").read_bytes(), json.loads((tmp_path / "report.json").read_text())
    assert Report.model_validate(content) == report and sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert b"<script" not in page and b"&lt;script&gt;text" in page and len(page) < 1e6
    assert content["alarms"][0].keys() == {"found", "action"}
    write_report(tmp_path, bundle, embeddings, items, shown_N=shown)
    assert (tmp_path / "report.html").read_bytes() == page


def test_the_curves_of_the_fit_are_drawn_and_kept(case):
    bundle, embeddings, items, _ = case
    untold = replace(bundle, report=measure(embeddings, bundle.codes_NL, bundle.quantizer))
    assert "The fit" not in report_page(measure_bundle(untold, embeddings, items, QUIET))
    told = replace(bundle, report=measure(embeddings, bundle.codes_NL, bundle.quantizer, {"loss": [3.0, 2.0, 1.0]}))
    report = measure_bundle(told, embeddings, items, QUIET)
    assert report.history == {"loss": (3.0, 2.0, 1.0)} and "The fit" in report_page(report)


def test_wrong_inputs_are_one_readable_error(case, tmp_path):
    bundle, embeddings, items, shown = case
    with pytest.raises(TokenizerError, match="the catalogue has 399 items, the tokenizer 400"):
        measure_bundle(bundle, embeddings, items[:399], QUIET)
    with pytest.raises(TokenizerError, match="401 embeddings for the 400 items"):
        measure_bundle(bundle, np.concatenate([embeddings, embeddings[:1]]), items, QUIET)
    with pytest.raises(TokenizerError, match="encode to the codes"):
        measure_bundle(bundle, embeddings[::-1], items, QUIET)
    with pytest.raises(TokenizerError, match="how often items were shown"):
        measure_bundle(bundle, embeddings, items, QUIET, shown[:5])
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot write the report"):
        write_report(tmp_path / "file", bundle, embeddings, items)
    for name, content in (("missing", None), ("text", b"hello"), ("pickle", np.array([object()], dtype=object))):
        if content is not None:
            np.save(tmp_path / name, content) if name == "pickle" else (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"cannot be read .* give a \.npy"):
            read_embeddings(tmp_path / f"{name}.npy")
    np.save(tmp_path / "int.npy", np.zeros((3, 2), int))
    with pytest.raises(TokenizerError, match="give floats"):
        read_embeddings(tmp_path / "int.npy")
