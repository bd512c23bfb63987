"""Fit the tokenizer of a data set: item embeddings → RQ-Kmeans → semantic IDs, saved as a bundle with a quality report.

    python launch/fit_tokenizer.py --config configs/tokenizer/complete_journey.yaml tokenizer.codebook_size=512
    python launch/fit_tokenizer.py --config ... --append     # encode only what the catalogue has gained, without refitting
"""

import time
from pathlib import Path

from data_pipeline.tokenize_items import FitTokenizerConfig, append_items, build_tokenizer, open_catalogue
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli
from gpr_dist.tokenizer.kmeans import resolve_device
from gpr_dist.tokenizer.metrics import format_report

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/tokenizer/complete_journey.yaml"


def main() -> None:
    config, args = parse_cli(FitTokenizerConfig, __doc__, DEFAULT_CONFIG, flags={"--append": "encode new items with the bundle there is"})
    catalogue = open_catalogue(config.data)
    device = resolve_device(config.tokenizer.device)
    if args.dry_run:
        print(f"{to_yaml(config)}\n{catalogue.num_items:,} items of catalogue {catalogue.fingerprint}, on {device}")
        return
    started = time.perf_counter()
    bundle = append_items(config) if args.append else build_tokenizer(config)
    seconds = time.perf_counter() - started
    if bundle.report is not None and not args.append:
        print(format_report(bundle.report))
    print(f"tokenizer {bundle.fingerprint} (codebooks {bundle.codebook_fingerprint}) in {config.out}: "
          f"{bundle.num_items:,} items in {seconds:.1f} s on {device}, {bundle.num_items / seconds:,.0f} items/s")


if __name__ == "__main__":
    run_cli(main)
