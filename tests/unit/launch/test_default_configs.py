"""Scripts find their default config wherever they are started."""

import pytest
from documents import ROOT, launch_module

from gpr_dist.errors import run_cli


@pytest.mark.parametrize("script", ["build_data", "fit_tokenizer", "build_knowledge", "finetune"])
def test_the_default_config_does_not_depend_on_the_current_folder(script, tmp_path, monkeypatch, capsys):
    """It is read; what it says about data is still relative to where the user stands."""
    main = launch_module(script).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--dry-run", "no_such_setting=1"])
    with pytest.raises(SystemExit) as left:
        run_cli(main)
    printed = capsys.readouterr().err
    assert left.value.code == 2 and printed.startswith(f"ConfigError: {ROOT / 'configs'}") and "unknown key no_such_setting" in printed
