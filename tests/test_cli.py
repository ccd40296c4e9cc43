import functools
import json
from typing import get_args

import pytest

from fastsae import cli, cli_report


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help_for_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--out" in shown or "--sae" in shown or "--d-in" in shown
    assert len(shown.splitlines()) > 10 and "partial" not in shown


def test_the_command_line_offers_what_there_is(monkeypatch, capsys):
    from fastsae.activations import RULES
    from fastsae.config import Activation

    assert get_args(Activation) == tuple(RULES)
    for verb in ("analyze", "match", "split"):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        assert "Stopped, the same command goes on" in capsys.readouterr().out
    monkeypatch.setitem(cli.VERBS, "analyze", asked := functools.wraps(cli.analyze)(lambda **given: given))
    assert cli.main(["analyze", "--sae", "a", "--model", "b", "-o", "c", "--json"]) == 0 and asked
    assert json.loads(capsys.readouterr().out)["out"] == "c"


def test_bad_text_is_one_line_and_exit_2(tmp_path, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà vu".encode("latin1"))
    assert cli.main(["lm", "--out", str(tmp_path / "lm"), "--text", str(latin)]) == 2
    message = capsys.readouterr().err.strip()
    assert "not UTF-8" in message and "\n" not in message
    assert not (tmp_path / "lm").exists()


def test_options_that_cannot_be_meant_are_one_line_and_exit_2(tmp_path, capsys):
    argv = ["train", "--store", "x", "--out", str(tmp_path / "sae"), "--activation", "topk", "--d-sae", "8", "--k", "9"]
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message == "fastsae: k must be at most d_sae = 8, got 9; lower k or widen the dictionary\n"


def test_a_preset_gives_the_defaults_and_options_go_on_top(tmp_path):
    import torch

    from fastsae.store_writer import StoreWriter

    writer = StoreWriter(tmp_path / "store", width=16, dtype="float32", meta={}, seed=0)
    rows = torch.randn(256, 16)
    number = torch.arange(256)
    writer.add(rows, number, number, number)
    writer.close()
    argv = ["train", "--store", str(tmp_path / "store"), "--out", "x", "--preset", "monosemanticity"]
    config = cli._with_preset(cli.train, argv).keywords["config"]
    assert config.activation == "relu" and config.l1_coefficient == pytest.approx(0.004 * 16)


def test_analyze_passes_controls_and_widths_on(monkeypatch, tmp_path, capsys):
    import fastsae.analysis

    asked = {}

    def analyze(*args, **options):
        asked.update(options)
        return {
            "left_out": [{"name": "Thai", "tokens": [3, 0]}],
            "notes": [{"name": "ablation", "reason": "no document is long enough"}],
        }

    monkeypatch.setattr(fastsae.analysis, "analyze", analyze)
    monkeypatch.setattr(cli_report, "load_sae", lambda folder, *_: folder.name)
    monkeypatch.setattr(cli_report, "load_model", lambda name: (name, "tokenizer"))
    monkeypatch.setattr(cli_report, "load_beside", lambda name, *_: name)
    argv = ["analyze", "--sae", "A", "--model", "M", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--control-sae", "C", "--control-model", "S", "--widths", "narrow", "wide"]) == 0
    assert asked == {"other": None, "control": ("C", "S"), "widths": ["narrow", "wide"]}
    shown = capsys.readouterr().out
    assert "left out: Thai           3 and 0 of" in shown and "without ablation         no document is" in shown
    assert cli.main([*argv, "--control-sae", "C"]) == 2
    assert capsys.readouterr().err == "fastsae: control_sae and control_model go together, got one of them\n"


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.tyro.extras, "subcommand_cli_from_dict", stop)
    assert cli.main(["train"]) == 130
    assert "the same command with --resume goes on from here" in capsys.readouterr().err
    assert cli.main(["demo"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
