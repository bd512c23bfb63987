"""README.md of a bundle: the model card, written from what the export knows."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpr_dist.model.gpr import GPRConfig
from gpr_dist.serving import requests
from gpr_dist.serving.settings import BundleSettings

CARD = "README.md"


def write_card(folder: Path, settings: BundleSettings, source: Mapping[str, Any], fingerprints: Mapping[str, str], model: GPRConfig,
               num_weights: int, splits: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]], license: str, note: str,
               is_calibrated: bool) -> None:
    """Args: splits: facts about the data, `reports`: those of launch/evaluate.py on this checkpoint; both may be empty."""
    search, asked = settings.search, settings.requests
    text = [
        "# GPR bundle: a generative ad recommender", "",
        f"Generates the semantic IDs of the ads a user may want next (GPR, arXiv 2511.10138). Checkpoint {source['checkpoint']} of run "
        f"{source['run']}, step {source['step']}, {num_weights:,} weights stored as {source['dtype']}, width {model.width}, "
        f"{model.num_levels} levels of {model.codebook_size} codes, {settings.num_items:,} items.",
        *([note] if note else []), "",
        "## Load", "",
        "Needs torch, numpy, pyarrow, safetensors, pydantic and the package gpr_dist; no DeepSpeed, no W&B, no GPU.", "",
        "```", "python launch/recommend.py bundle=THIS_FOLDER requests=THIS_FOLDER/example.jsonl > answers.jsonl", "```", "",
        "```python", "from gpr_dist.serving.recommender import Recommender",
        "recommender = Recommender.load('THIS_FOLDER')  # compares every checksum",
        "answers = recommender.recommend(recommender.parse([b'{\"time\": 1512120000}']))", "```", "",
        "A further job starts from it with `init_from=THIS_FOLDER`.", "",
        "## Requests", "", *_indented_request_format(), "",
        f"- `user_features`: {_names(asked.user_features)}",
        f"- `env`: {_names(asked.env_features)}" + (f" (made from `time` if left out: {', '.join(asked.time_features)})"
                                                    if asked.time_features else ""),
        f"- journeys of at most {asked.max_tokens} tokens; of a longer history the most recent part is read",
        f"- audience: {_names(asked.audience_fields)}" + (" (rules.json)" if asked.audience_fields else ""),
        f"- ranker: {settings.ranker}" + (f", mix {settings.mix_weights}" if settings.mix_weights else ""),
        f"- at most {settings.max_k} ads per answer, by {settings.order}; search: {search.strategy}, softmax over codes: {search.softmax}, "
        f"MTP heads {', '.join(map(str, search.heads))}",
        "- values: " + ("expected value in the units of the log, calibrated on the validation split" if is_calibrated
                        else "none, the value head is not calibrated"),
        *([f"- `knowledge`: {asked.num_knowledge_vectors} vectors of width {asked.knowledge_width}, made by the encoder of knowledge "
           f"{fingerprints.get('knowledge')}"] if asked.num_knowledge_vectors else []), "",
        "## Data", "", "| split | journeys | tokens | target ads | from | to | fingerprint |", "|---|---|---|---|---|---|---|",
        *(f"| {s['split']} | {s['rows']:,} | {s['tokens']:,} | {s['targets']:,} | {_day(s['first'])} | {_day(s['last'])} | "
          f"{s['fingerprint']} |" for s in splits), "",
        "## Quality", "", *_quality(reports), "",
        "## Fingerprints", "", *(f"- {kind}: `{value}`" for kind, value in sorted(fingerprints.items())), "",
        "## Limits", "",
        "- It ranks among ads of its catalogue; ads that came later need a new bundle (the tokenizer encodes them without refitting).",
        "- It repeats the exposure of its logs: what was shown often is ranked high. Auction, budgets and policy checks are the caller's.",
        "- The history may hold personal data; nothing of a request is kept.", "",
        "## License", "", license, ""]
    (folder / CARD).write_text("\n".join(text), encoding="utf-8")


def _indented_request_format() -> list[str]:
    """The module docstring of requests.py, which is the format's definition."""
    return (requests.__doc__ or "").splitlines()


def _quality(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for report in reports:
        results = {name: values for name, values in report.get("results", {}).items() if isinstance(values, Mapping)}
        columns = [name for name in next(iter(results.values()), {}) if name.startswith(("hitr@", "ndcg@"))]
        lines += [f"{report.get('split')} split ({report['file']}):", "", f"| ranker | {' | '.join(columns)} |",
                  "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(_number(values.get(column)) for column in columns) + " |" for name, values in results.items()]
        lines.append("")
    return lines or ["No report of this checkpoint was found beside it; run launch/evaluate.py before launch/export.py."]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _names(features: Sequence[str]) -> str:
    return ", ".join(features) or "none"


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
