"""External knowledge of a data set's users: texts → frozen encoder → vectors that the model reads beside the journey.

    python launch/build_knowledge.py --config configs/knowledge/complete_journey.yaml
    python launch/build_knowledge.py --config ... template=null given.path=users.parquet given.as_of_column=written_at
    python launch/pretrain.py data.knowledge=data/complete_journey/knowledge
"""

import time
from pathlib import Path

from data_pipeline.knowledge import TEXTS, BuildKnowledgeConfig, build_knowledge, describe_knowledge, show_texts
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    config, args = parse_cli(BuildKnowledgeConfig, __doc__, ROOT / "configs/knowledge/complete_journey.yaml")
    config = with_build_from_root(config)
    if args.dry_run:
        print(to_yaml(config))
        print("\n".join(describe_knowledge(config)))
        return
    started = time.perf_counter()
    manifest = build_knowledge(config)
    seconds = time.perf_counter() - started
    if config.template:
        print("\n".join(show_texts(config.out / TEXTS, manifest.columns, num_users=3)))
    print(f"knowledge {manifest.fingerprint} in {config.out}: {manifest.num_texts:,} texts x {manifest.num_vectors} vectors of width "
          f"{manifest.width} ({', '.join(manifest.columns)}) in {seconds:.1f} s")
    for rows in manifest.splits.values():
        print(f"{rows.split:<12}{rows.num_rows:>14,} journeys, {rows.num_missing:,} without a text (\"absent\")")


def with_build_from_root(config: BuildKnowledgeConfig) -> BuildKnowledgeConfig:
    """The configs that come with the repository are found from any folder."""
    template = config.template
    if template is None or template.build is None or template.build.exists():
        return config
    return config.model_copy(update={"template": template.model_copy(update={"build": ROOT / template.build})})


if __name__ == "__main__":
    run_cli(main)
