"""Commands that cannot be meant: one line, with the option, what it takes, what came and where to look."""

import json
import re
import shlex

import pytest

from fastsae import cli
from fastsae.cli_errors import again

EXPLAIN = "explain --sae a --model b --out c "
TRAIN = "train --store a --out b "


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (EXPLAIN + "--tokens 2M", "--tokens takes a whole number or None, got '2M'; see fastsae explain --help"),
        (TRAIN + "--tokens 2M", "--tokens takes a whole number, got '2M'; see fastsae train --help"),
        (TRAIN + "--lr abc", "--lr takes a number, got 'abc'; see fastsae train --help"),
        (TRAIN + "--seed \"it's\"", "--seed takes a whole number, got \"it's\"; see fastsae train --help"),
        (EXPLAIN + "--features 1 x", "--features takes whole numbers, got '1 x'; see fastsae explain --help"),
        (
            EXPLAIN + "--explainer foo",
            "--explainer must be one of offline, endpoint, local, got 'foo'; see fastsae explain --help",
        ),
        (
            TRAIN + "--activation gated",
            "--activation must be one of relu, topk, batchtopk, jumprelu, got 'gated'; see fastsae train --help",
        ),
        (EXPLAIN + "--windows", "--windows needs a value; see fastsae explain --help"),
        (EXPLAIN + "extra", "explain has no use for 'extra'; see fastsae explain --help"),
        ("explain --sae a", "explain needs --model and --out; see fastsae explain --help"),
        ("analyze --sae a", "analyze needs --out; see fastsae analyze --help"),
        (
            "analyze --sae a -o b",
            "analyze needs the model that the dictionary was trained on: give --model, or --store",
        ),
        (
            "explain --sae a --out c --windoes 3",
            "explain needs --model, and there is no option --windoes; see fastsae explain --help",
        ),
        ("serve", "serve needs PATH; see fastsae serve --help"),
        (TRAIN + "--presett x", "there is no option --presett, did you mean --preset; see fastsae train --help"),
        (
            "demo --out a --resume",
            "there is no option --resume here, but in fastsae harvest, fastsae lm and fastsae train; "
            "see fastsae demo --help",
        ),
        ("trian --store a", "there is no verb 'trian'; did you mean train; see fastsae --help"),
        ("--nonsense", "there is no option --nonsense; see fastsae --help"),
    ],
)
def test_it_is_one_line_and_exit_2(command, message, columns, framed, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("tyro._fmtlib._should_use_utf8_drawing_chars", lambda: framed, raising=False)
    assert cli.main(shlex.split(command)) == 2
    assert capsys.readouterr() == ("", f"fastsae: {message}\n")


def test_an_error_in_another_form_is_one_line_too(monkeypatch, capsys):
    """A later tyro may word it otherwise: what it says stays, the frame goes."""

    def other(*args, **options):
        lines = ("╭─ Trouble ─╮", "│ Something │", "│ is wrong. │", "│ ───────── │", "│ more      │", "╰───────────╯")
        print("\n".join(lines), file=cli.sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(cli.tyro.extras, "subcommand_cli_from_dict", other)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fastsae: Something is wrong.; see fastsae train --help\n"


def test_what_a_stopped_verb_says_follows_from_its_options():
    said = {verb: again([verb], cli.VERBS) for verb in cli.VERBS}
    resumed = {verb for verb, text in said.items() if "--resume" in text}
    assert resumed == {"lm", "harvest", "train"}
    assert {verb for verb, text in said.items() if text == "the same command goes on from here"} == {
        "analyze", "demo", "explain", "match", "split",
    }  # fmt: skip
    assert said["eval"] == said["steer"] == said["serve"] == "the same command starts over"
    assert again([], cli.VERBS) == again(["nonsense"], cli.VERBS) == "the same command starts over"


def test_a_folder_that_is_no_store(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"kind": "lm"}), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert cli.main(["train", "--store", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "holds no activation store (it is what fastsae made as 'lm')" in said and "unfinished" not in said
    (tmp_path / "run.json").write_text(json.dumps({"kind": "store"}), encoding="utf-8")
    assert cli.main(["train", "--store", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is unfinished: harvest again" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "none" / "lm"), "there is no folder '.*': give the folder of a causal LM, or its name on the"),
        ("./lm", r"there is no folder './lm': give the folder"),
        (str(tmp_path / "empty"), "expected a Hugging Face causal LM in the folder '.*empty': "),
        ("no-such-owner/no-such-lm", r"there is no folder 'no-such-owner/no-such-lm', and no causal LM of that name"),
    ):
        assert cli.main(["eval", "--sae", str(tmp_path), "--model", name]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert "Repo id" not in said and len(said.splitlines()) == 1


def test_controls_in_a_message_are_shown(capsys):
    assert cli.main(["train", "--store", "\x1b[2J", "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "␛[2J" in said
