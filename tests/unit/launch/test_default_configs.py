"""Scripts find their default config wherever they are started."""

import os
import subprocess
import sys

import pytest
from documents import ROOT


@pytest.mark.parametrize("script", ["build_data.py", "fit_tokenizer.py", "build_knowledge.py"])
def test_the_default_config_does_not_depend_on_the_current_folder(script, tmp_path):
    """It is read; what it says about data is still relative to where the user stands."""
    done = subprocess.run([sys.executable, ROOT / "launch" / script, "--dry-run", "no_such_setting=1"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.startswith(f"ConfigError: {ROOT / 'configs'}"), done.stderr
    assert "unknown key no_such_setting" in done.stderr
