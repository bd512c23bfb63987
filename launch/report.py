"""Reports for people: `python launch/report.py COMMAND [--config FILE] [--strict] [key=value ...]`; each command has its own `--help`.

Each prints a text table and writes JSON and one HTML page that needs no network. With --strict an alarm makes the exit code 1.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from data_pipeline.tokenize_items import FitTokenizerConfig, catalogue_table, open_catalogue
from gpr_dist.config import Config, parse_cli, to_yaml
from gpr_dist.data.counts import count_ads
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import ConfigError, TokenizerError, run_cli
from gpr_dist.html import SERIES, Alarm
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.drift import DriftConfig
from gpr_dist.tokenizer.drift_page import format_drift, write_drift
from gpr_dist.tokenizer.report import ReportConfig, read_embeddings, read_items
from gpr_dist.tokenizer.report_page import format_text, write_report
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training.run_log import read_run
from gpr_dist.training.run_page import format_runs, run_alarms, run_page, summary

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/tokenizer/complete_journey.yaml"


class TokenizerReportConfig(FitTokenizerConfig):
    """The settings of launch/fit_tokenizer.py, and what the report does with its bundle."""

    embeddings: Path | None = None
    """.npy of the items' embeddings; none = embeddings.npy of the data folder, and if that is not there the report goes without"""
    report: ReportConfig = ReportConfig()
    """alarm thresholds"""
    report_folder: Path | None = None
    """where report.json and report.html go; none = the bundle's folder"""
    max_shown_tokens: int = Field(20_000_000, ge=0)
    """training tokens read to count how often each ad was shown, an even choice of the record batches; 0 = do not count"""


def report_tokenizer(config: TokenizerReportConfig) -> tuple[Alarm, ...]:
    """Measure a bundle on its catalogue. Returns: its alarms."""
    bundle = SemanticIds.load(config.out)
    catalogue = open_catalogue(config.data)
    bundle.check_catalogue(catalogue.fingerprint, str(catalogue.folder))
    default = config.data / "embeddings.npy"
    embeddings_ND = read_embeddings(config.embeddings or default) if config.embeddings or default.exists() else None
    shown_N = count_shown(config.data / "shards" / "train", bundle, config.max_shown_tokens)
    folder = config.report_folder or config.out
    report = write_report(folder, bundle, embeddings_ND, read_items(catalogue_table(catalogue)), config.report, shown_N)
    if embeddings_ND is None:
        print(f"no {default}: error, PAS and identical embeddings are not measured; give embeddings=FILE")
    print(f"{format_text(report)}\n{folder / 'report.html'}")
    return report.alarms


class DriftReportConfig(Config):
    """Which items are compared with those a tokenizer was fitted on."""

    tokenizer: Path = Path("data/complete_journey/tokenizer")
    """folder of the bundle"""
    data: Path | None = None
    """data folder whose grown catalogue the bundle encodes (launch/fit_tokenizer.py --append): the items that the fit did not see"""
    embeddings: Path | None = None
    """.npy of today's items, made like those of the fit; with data: of its whole catalogue, none = its appended_embeddings.npy"""
    training_embeddings: Path | None = None
    """.npy of the items of the fit; none = embeddings.npy beside the bundle's folder if it has their number, else what the fit stored"""
    drift: DriftConfig = DriftConfig()
    """alarm thresholds"""
    report_folder: Path | None = None
    """where drift.json and drift.html go; none = the bundle's folder"""


def report_drift(config: DriftReportConfig) -> tuple[Alarm, ...]:
    """Compare today's items with the training items of a bundle. Returns: the alarms."""
    bundle = SemanticIds.load(config.tokenizer)
    embeddings_nD, items = open_today(config, bundle)
    folder = config.report_folder or config.tokenizer
    report = write_drift(folder, bundle, embeddings_nD, config.drift, open_training(config, bundle), items)
    print(f"{format_drift(report)}\n{folder / 'drift.html'}")
    return report.alarms


def open_today(config: DriftReportConfig, bundle: SemanticIds) -> tuple[np.ndarray, pa.Table | None]:
    """Embeddings of today's items and, where there is a catalogue, its rows."""
    if config.data is None:
        if config.embeddings is None:
            raise ConfigError("give data=FOLDER with a grown catalogue or embeddings=FILE.npy of the items to compare")
        return read_embeddings(config.embeddings), None
    catalogue = open_catalogue(config.data)
    bundle.check_catalogue(catalogue.fingerprint, str(catalogue.folder))
    first = bundle.report.num_items if bundle.report else bundle.num_items
    if catalogue.num_items <= first:
        raise TokenizerError(f"{catalogue.folder} has no items that tokenizer {config.tokenizer} was not fitted on; give a data folder "
                             "with a grown catalogue, or embeddings=FILE.npy of the items to compare")
    path = config.embeddings or config.data / "appended_embeddings.npy"
    embeddings_ND = read_embeddings(path)
    if len(embeddings_ND) != catalogue.num_items:
        raise TokenizerError(f"{path} has {len(embeddings_ND):,} embeddings, {catalogue.folder} {catalogue.num_items:,} items; make them "
                             "anew with launch/fit_tokenizer.py --append")
    return embeddings_ND[first:], read_items(catalogue_table(catalogue)).slice(first)


def open_training(config: DriftReportConfig, bundle: SemanticIds) -> np.ndarray | None:
    """Embeddings of the items of the fit, as given or as found beside the bundle's folder."""
    if config.training_embeddings is not None:
        return read_embeddings(config.training_embeddings)
    beside = config.tokenizer.resolve().parent / "embeddings.npy"
    found_ND = read_embeddings(beside) if beside.exists() else None
    return found_ND if found_ND is not None and bundle.report and len(found_ND) == bundle.report.num_items else None


def count_shown(shards: Path, bundle: SemanticIds, max_tokens: int) -> np.ndarray | None:
    """Times each ad was shown in (a part of) the training journeys; none without them."""
    if not max_tokens or not (shards / "manifest.json").is_file():
        return None
    reader = ShardReader(shards)
    bundle.check_catalogue(reader.manifest.catalogue_fingerprint, str(shards))
    return count_ads(reader, World(0, max(1, -(-reader.manifest.num_tokens // max_tokens))), bundle.num_items)


class RunReportConfig(Config):
    """Which training runs are shown."""

    runs: tuple[Path, ...] = ()
    """run folders, shown beside each other; also without "runs=", one after another"""
    report_folder: Path | None = None
    """where run.json and run.html go; none = the first run's folder"""

    @model_validator(mode="after")
    def _check(self) -> "RunReportConfig":
        if not 0 < len(self.runs) <= len(SERIES):
            raise ValueError(f"runs: {len(self.runs)} folders; give 1 to {len(SERIES)}, as many as there are colours")
        return self


def report_runs(config: RunReportConfig) -> tuple[Alarm, ...]:
    """Show training runs from their folders, while they run or later. Returns: alerts and failures."""
    runs = [read_run(folder) for folder in config.runs]
    folder = config.report_folder or config.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "run.json", json.dumps([summary(run) for run in runs], indent=1).encode())
    write_atomic(folder / "run.html", run_page(runs).encode())
    print(f"{format_runs(runs)}\n{folder / 'run.html'}")
    return run_alarms(runs)


COMMANDS: dict[str, tuple[type[Config], Path | None, Callable, str]] = {
    "tokenizer": (TokenizerReportConfig, DEFAULT_CONFIG, report_tokenizer, "quality of a tokenizer bundle on its catalogue, with alarms"),
    "drift": (DriftReportConfig, None, report_drift, "today's items beside those a tokenizer was fitted on, with alarms"),
    "run": (RunReportConfig, None, report_runs, "training runs beside each other: run runs/a [runs/b ...]"),
}


def main() -> int:
    """Run the command named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {command:10} {text}" for command, (*_, text) in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown report {name!r}; there is: {', '.join(COMMANDS)}")
    config_class, default, run, text = COMMANDS[name]
    config, args = parse_cli(config_class, text, default, sys.argv[2:], {"--strict": "exit code 1 when there is an alarm"},
                             words="runs" if name == "run" else None)
    if args.dry_run:
        print(to_yaml(config), end="")
        return 0
    alarms = run(config)
    return 1 if alarms and args.strict else 0


if __name__ == "__main__":
    run_cli(main)
