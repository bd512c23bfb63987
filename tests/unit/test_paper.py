"""PAPER.md is complete and true: every equation, figure and table has a row, and whatever it names exists."""

import re

import pytest
from documents import ROOT, broken_references, references

PAPER = (ROOT / "PAPER.md").read_text(encoding="utf-8")
FIGURES = ("2a", "2b", "2c", "2d", "3", "4a", "4b")
NUMBERED = [*(f"Eq. {n}" for n in range(1, 11)), *(f"Fig. {n}" for n in FIGURES), *(f"Table {n}" for n in (1, 2, 3))]
PENDING = re.compile(r"not built yet \(issue \d+\)")


def rows() -> list[list[str]]:
    """Cells of the first table: paper, what, function, test, where we differ."""
    table = PAPER.split("\n## ")[1]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines() if line.startswith("| ")][1:]


def test_everything_named_exists():
    assert len(references(PAPER)) > 50
    assert broken_references(PAPER) == []


@pytest.mark.parametrize("number", NUMBERED)
def test_every_equation_figure_and_table_has_a_row(number):
    named = [part if part[0].isalpha() else f"Fig. {part}" for row in rows() for part in row[0].split(", ")]
    assert number in named


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}: {row[1]}"[:40])
def test_a_row_names_function_and_test_or_the_issue_that_brings_them(row):
    _, _, function, test, _ = row
    if PENDING.fullmatch(function):
        assert not test
        return
    assert {separator for _, separator, _ in references(function)} == {":"}
    assert {separator for _, separator, _ in references(test)} == {"::"}


def test_differences_that_rows_refer_to_are_explained():
    explained = set(re.findall(r"^\*\*(D\d+)\.", PAPER, re.MULTILINE))
    assert explained == {f"D{n}" for n in range(1, len(explained) + 1)}
    assert set(re.findall(r"\((D\d+)\)", PAPER)) <= explained


@pytest.mark.parametrize("wrong", ["`gpr_dist/model/gpr.py:GPT`", "`gpr_dist/model/none.py:GPR`", "`gpr_dist/model/gpr.py:GPR.fast`",
                                   "`gpr_dist/model/gpr.py::GPR`", "`tests/numerics/test_mtp.py::test_none`",
                                   "`tests/numerics/test_mtp.py:test_one_head_is_plain_next_item_prediction`"])
def test_a_wrong_name_is_found(wrong):
    assert len(broken_references(f"as in {wrong}")) == 1
