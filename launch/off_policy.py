"""Estimate what one policy earns from the logs of another: IPS, SNIPS, the direct method and doubly robust, with intervals.

The target policy is read from its own logs (how often it shows each ad in each policy context); its own mean reward stands beside the
estimates, so that they can be checked.

    python launch/off_policy.py folder=DIR        # Open Bandit: the value of Thompson sampling from uniformly random logs
    python launch/off_policy.py folder=DIR logs=bts/all/all.csv target=random/all/all.csv          # the other way round
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from gpr_dist.config import parse_cli, public
from gpr_dist.errors import ConfigError, DataError, run_cli
from gpr_dist.evaluation.names import check_names
from gpr_dist.evaluation.off_policy import Logged, OffPolicyConfig, Policy, evaluate_policy, format_estimates, mean_reward, policy_of
from gpr_dist.schema import write_atomic

FORMATS = (".csv", ".parquet", ".arrow", ".feather")


class LogsConfig(OffPolicyConfig):
    """Two logs and what their columns mean; the defaults are Open Bandit's."""

    folder: Path = Path(".")
    """where the two logs are"""
    logs: Path = Path("random/all/all.csv")
    """of the logging policy, a .csv, .parquet or .arrow file, relative to folder"""
    target: Path = Path("bts/all/all.csv")
    """of the target policy"""
    action: str = "item_id"
    """column of the ad shown"""
    reward: str = "click"
    """column of the reward"""
    propensity: str = "propensity_score"
    """column of the ad's probability under the policy that logged it"""
    policy_context: tuple[str, ...] = ("position",)
    """columns the target policy looks at"""
    features: tuple[str, ...] = ("position", "user_feature_0", "user_feature_1", "user_feature_2", "user_feature_3")
    """columns the reward may depend on besides the ad"""
    user: str | None = None
    """column of the user; none = impressions are independent"""
    out: Path | None = None
    """JSON report; none = only printed"""


def main() -> None:
    config, args = parse_cli(LogsConfig, __doc__)
    columns = [config.action, config.reward, config.propensity, *config.policy_context, *config.features, *filter(None, [config.user])]
    logs, target = (read_logs(config.folder / name, columns) for name in (config.logs, config.target))
    if args.dry_run:
        print(f"would estimate {config.folder / config.target} ({target.num_rows:,} rows) from {config.logs} ({logs.num_rows:,} rows)")
        return
    actions = join_codes(logs, target, (config.action,))
    contexts = join_codes(logs, target, config.policy_context)
    sizes = [int(max(part.max() for part in parts)) + 1 for parts in (contexts, actions)]
    policy = Policy(policy_of(contexts[1], actions[1], *sizes), contexts[0])
    context_NF = np.stack([join_codes(logs, target, (name,))[0] for name in config.features], axis=1)
    reward, users = numbers(logs, config.reward), user_numbers(logs, config.user)
    logged = Logged(actions[0], reward, numbers(logs, config.propensity), context_NF, users)
    found = evaluate_policy(logged, policy, config)
    own = mean_reward(numbers(target, config.reward), user_numbers(target, config.user), config.bootstrap)
    print(format_estimates(found, config.bootstrap.level, own))
    if config.out:
        write_atomic(config.out, json.dumps({**found, "target": own, "settings": public(config)}, indent=1).encode())


def read_logs(path: Path, columns: list[str]) -> pa.Table:
    """Raises: ConfigError for a missing file or an unknown column; DataError for a damaged or empty file."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name the folder of the logs by folder=DIR")
    try:
        data = pads.dataset(path, format=path.suffix[1:])
        check_names("columns", columns, data.schema.names)
        table = data.to_table(columns=sorted(set(columns)))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not table.num_rows:
        raise DataError(f"{path} has no rows")
    return table


def join_codes(logs: pa.Table, target: pa.Table, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's combination of values, the same in both tables."""
    both = pa.concat_tables([logs.select(names), target.select(names)], promote_options="permissive")
    codes = np.zeros(both.num_rows, np.int64)
    for name in names:
        column = both[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
        _, codes = np.unique(codes * (int(column.max()) + 1) + column, return_inverse=True)
    return codes[: logs.num_rows], codes[logs.num_rows :]


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64. Raises: DataError when it holds something that is no finite number."""
    try:
        values = table[name].cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise DataError(f"column {name} holds something that is no number: {error}") from None
    if not np.isfinite(values).all():
        raise DataError(f"column {name}: row {int(np.flatnonzero(~np.isfinite(values))[0])} is no finite number; leave such rows out")
    return values


def user_numbers(table: pa.Table, name: str | None) -> np.ndarray:
    return np.arange(table.num_rows) if name is None else join_codes(table, table.slice(0, 0), (name,))[0]


if __name__ == "__main__":
    run_cli(main)
