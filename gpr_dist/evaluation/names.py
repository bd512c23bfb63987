"""Names a user may choose from (rankers, metrics, features), and the names of hashed categories in a report."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpr_dist.errors import ConfigError, DataError


def check_names(setting: str, found: Sequence[str], known: Sequence[str]) -> None:
    """Raises: ConfigError naming the setting, what is not known, the nearest name, and all of them."""
    for name in found:
        if name not in known:
            lower = {each.lower(): each for each in known}
            near = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.0)
            guess = f"; did you mean {lower[near[0]]}?" if near else ""
            raise ConfigError(f"{setting}: {name!r} is not known{guess} (there are: {', '.join(known) or 'none'})")


def check_metric(setting: str, metric: str, names: Sequence[str], longest: int) -> None:
    """Raises: ConfigError unless `metric` is one of `names` with @K, 1 <= K <= longest."""
    name, _, k = metric.partition("@")
    check_names(setting, (name,), names)
    if not k.isdigit() or not 1 <= int(k) <= longest:
        raise ConfigError(f"{setting}: {metric!r} needs a cut-off from 1 to {longest} (the largest of settings.ks), e.g. "
                          f"{name}@{min(10, longest)}")


def read_value_names(data: Path) -> Mapping[str, Mapping[int, str]]:
    """Feature (or "scene") → category → name, the frequent ones, as the build has written them down; empty where it has not.

    Raises: DataError when the file is damaged.
    """
    path = data / "value_names.json"
    try:
        content = json.loads(path.read_bytes()) if path.exists() else {}
        return {feature: {int(category): str(name) for category, name in names.items()} for feature, names in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it, and reports show numbers instead of names") from None
