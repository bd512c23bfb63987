"""Fit the tokenizer of a data set: item embeddings → semantic IDs (RQ-Kmeans, RQ-VAE or RQ-Kmeans+), a bundle with a quality report.

    python launch/fit_tokenizer.py --config configs/tokenizer/complete_journey.yaml tokenizer.method=rq_kmeans_plus
    torchrun --nproc-per-node 8 launch/fit_tokenizer.py --config ...    # the same codebooks, whatever the number of processes
    python launch/fit_tokenizer.py --config ... --append                # encode only what the catalogue has gained, without refitting
"""

import time
from pathlib import Path

from data_pipeline.tokenize_items import FitTokenizerConfig, append_items, build_tokenizer, catalogue_table, open_catalogue
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import ConfigError, run_cli
from gpr_dist.tokenizer.collective import process_group, rank, world_size
from gpr_dist.tokenizer.kmeans import resolve_device
from gpr_dist.tokenizer.points import open_embeddings
from gpr_dist.tokenizer.report import read_items
from gpr_dist.tokenizer.report_page import format_text, write_report

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/tokenizer/complete_journey.yaml"


def main() -> None:
    config, args = parse_cli(FitTokenizerConfig, __doc__, DEFAULT_CONFIG, flags={"--append": "encode new items with the bundle there is"})
    catalogue = open_catalogue(config.data)
    device = resolve_device(config.tokenizer.device)
    if args.dry_run:
        print(f"{to_yaml(config)}\n{catalogue.num_items:,} items of catalogue {catalogue.fingerprint}, on {device}")
        return
    started = time.perf_counter()
    with process_group(device):
        processes = world_size()
        if args.append and processes > 1:
            raise ConfigError("--append encodes in one process; start it without a launcher")
        bundle = append_items(config) if args.append else build_tokenizer(config)
        if rank() != 0:
            return
    seconds = time.perf_counter() - started
    if not args.append:
        report = write_report(config.out, bundle, open_embeddings(config.data / "embeddings.npy"), read_items(catalogue_table(catalogue)))
        print(f"{format_text(report)}\n{config.out / 'report.html'}")
    print(f"tokenizer {bundle.fingerprint} (codebooks {bundle.codebook_fingerprint}) in {config.out}: {bundle.num_items:,} items in "
          f"{seconds:.1f} s on {device}, {processes} process{'es' * (processes > 1)}, {bundle.num_items / seconds:,.0f} items/s")


if __name__ == "__main__":
    run_cli(main)
