"""Erase users from a data set: rows, texts, vectors and history. Ids are given as in the logs.

    python launch/erase_user.py data=data/complete_journey 'users=["17", "23"]' --dry-run
    python launch/erase_user.py data=data/complete_journey users_file=requests_of_this_month.txt

Take them out of the logs too, or the next build brings them back. A run that was trained on the old rows refuses the new ones; it goes
on from its weights with another run.name and init_from=<its folder>. Models keep what they learned.
"""

from data_pipeline.erase import EraseConfig, erase_users
from gpr_dist.config import parse_cli
from gpr_dist.errors import run_cli


def main() -> None:
    config, args = parse_cli(EraseConfig, __doc__)
    splits = erase_users(config, args.dry_run)
    users = set().union(*(split.users for split in splits))
    print(f"{config.data}: {len(users)} user(s) found" + (", nothing is changed (--dry-run)" if args.dry_run else " and erased"))
    for split in splits:
        manifest = split.old.manifest
        changed = f"; data {manifest.fingerprint} is now {split.new.fingerprint}" if split.new else ""
        print(f"{manifest.split:<12}{len(split.rows):>10,} of {manifest.num_rows:,} rows, {split.num_tokens:,} of "
              f"{manifest.num_tokens:,} tokens{changed}")
    if any(split.new for split in splits):
        print("take them out of the logs too; runs go on from their weights with another run.name and init_from=<run folder>")


if __name__ == "__main__":
    run_cli(main)
