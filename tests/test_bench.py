"""The bench program runs everywhere, keeps what it measured, and refuses to time what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, checks, readme, results, shapes, timing
from bench.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch):
    """`bench gpu --dry-run` in this process, with the process left as it was: a run may set what a program owns."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    precision, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    yield lambda *args: main(["gpu", "--dry-run", *args])
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_gpu_dry_run_measures_every_kind_of_case(tmp_path):
    pytest.importorskip("triton")
    done = run("gpu", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["checks"] and all(check["passed"] for check in result["checks"])
    assert {row["op"] for row in result["rows"]} == {
        "copy", "matmul", "encoder", "encode", "part", "gemm", "decode", "encode + decode", "backward",
        "loss + backward", "step",
    }
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in result["rows"])
    assert result["machine"]["torch"] == torch.__version__


def test_step_measures_ours_and_the_yardsticks(tmp_path, capsys):
    sizes = ["--n", "64", "--d", "16", "--f", "512", "--k", "4", "--threads", "1", "--rounds", "2"]
    assert main(["step", *sizes, "--out", str(tmp_path)]) == 0
    (result,) = results.load("step", tmp_path)
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"encoder product", "fastsae topk", "fastsae relu + L1", "naive dense relu + L1"} <= set(rows)
    assert rows["encoder product"]["gemms"] == 1 and all(row["median_ms"] > 0 for row in rows.values())
    assert rows["fastsae topk"]["l0"] == pytest.approx(4, abs=0.5)
    assert "fastsae topk" in readme.fill("<!-- bench: step -->\n<!-- end bench -->\n", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none(capsys):
    assert main(["gpu"]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_a_case_that_fails_is_a_note_and_the_run_goes_on(tmp_path, monkeypatch, dry_run):
    def broken(device):
        raise RuntimeError("no such kernel")

    shape = shapes.TINY[0]
    works = shapes.Case("encoder", "fine", shape, torch.float32, lambda device: lambda: None)
    monkeypatch.setattr(cases, "ceilings", lambda: [shapes.Case("decode", "bad", shape, torch.float32, broken), works])
    monkeypatch.setattr(cases, "all_cases", lambda *given: [])
    monkeypatch.setattr(checks, "decode_checks", broken)
    monkeypatch.setattr(checks, "encode_checks", lambda device: [])
    for name in ("step_checks", "train_step_checks"):
        monkeypatch.setattr(checks, name, lambda device: [])
    assert dry_run("--out", str(tmp_path)) == 1
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert [row.get("note") for row in result["rows"]] == ["RuntimeError: no such kernel", None]
    assert [check["passed"] for check in result["checks"]] == [False]


def test_a_run_that_is_out_of_time_starts_no_case(tmp_path, monkeypatch, dry_run):
    monkeypatch.setattr(checks, "decode_checks", lambda device: [])
    for name in ("step_checks", "train_step_checks"):
        monkeypatch.setattr(checks, name, lambda device: [])
    assert dry_run("--seconds", "0", "--out", str(tmp_path)) == 0
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert result["rows"] and all(row["note"] == "not started: out of time" for row in result["rows"])


def test_a_wrong_decode_is_not_timed():
    indices, values, w_dec = torch.tensor([[0, 2]]), torch.tensor([[1.0, 3.0]]), torch.randn(4, 8)
    right = w_dec[0] + 3 * w_dec[2]
    checks.check_decode(right[None], indices, values, w_dec)
    for wrong in (right * 1.001, right.clone().fill_(float("nan")), w_dec[0]):
        with pytest.raises(checks.WrongResult):
            checks.check_decode(wrong[None], indices, values, w_dec)


def test_percentiles():
    timed = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (timed.median_ms, timed.p20_ms, timed.p80_ms, timed.repeats) == (3.5, 2.0, 5.0, 6)


def test_measure_counts_calls():
    calls = []
    timed = timing.measure(lambda: calls.append(1), torch.device("cpu"), seconds=0.0, least=4)
    assert timed.repeats == 4 and len(calls) == 6 and timed.peak_mib is None


def saved(folder: Path, kind: str = "step", **row) -> Path:
    about = results.machine() | {"processor": "Some CPU (R)", "threads": 2, "commit": "abc"}
    full = {"op": "step", "variant": "fastsae topk", "shape": "S", "N": 8, "D": 4, "F": 16, "K": 2,
            "dtype": "float32", "median_ms": 12.34, "p20_ms": 12.0, "p80_ms": 13.0, "gemms": 1.75} | row
    return results.save(kind, about, [full], results.path_for(kind, about, folder))


def test_results_are_kept_by_machine(tmp_path):
    assert saved(tmp_path).name == "step-some-cpu-r-2-threads.json"
    saved(tmp_path, variant="later")
    (result,) = results.load("step", tmp_path)
    assert result["rows"][0]["variant"] == "later" and result["machine"]["commit"] == "abc"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_results_of_another_format_are_refused(tmp_path):
    (tmp_path / "step-x.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0, expected 1"):
        results.load("step", tmp_path)


def test_readme_tables_come_from_the_results(tmp_path, capsys):
    saved(tmp_path)
    file = tmp_path / "README.md"
    end = "<!-- end bench -->\n"
    file.write_text(f"Before.\n<!-- bench: step -->\nold\n{end}<!-- bench: gpu -->\n{end}After.\n")
    arguments = ["readme", "--file", str(file), "--results", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    text = file.read_text()
    assert "| fastsae topk | 12.3 (12.0 to 13.0) | 1.75 |  |" in text and "N 8, D 4, F 16, K 2, float32." in text
    assert "Some CPU (R), 2 threads" in text and "old" not in text
    assert "Not measured yet" in text and text.startswith("Before.") and text.endswith("After.\n")
    assert main([*arguments, "--check"]) == 0


def test_readme_without_marks_is_left_alone(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text("no marks")
    assert main(["readme", "--file", str(file)]) == 2
    assert file.read_text() == "no marks" and "<!-- bench: step -->" in capsys.readouterr().out


def test_our_own_readme_is_up_to_date():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.fill(text, results.FOLDER) == text, "run python -m bench readme"


def test_dead_measures_every_choice(tmp_path, capsys):
    from bench.dead import EVERY

    threads = torch.get_num_threads()
    sizes = ["--d-sae", "512", "--tokens", "64", "--steps", "48", "--dead-after", "512", "--threads", str(threads)]
    assert main(["dead", *sizes, "--out", str(tmp_path)]) == 0
    (result,) = results.load("dead", tmp_path)
    assert [(row["every"], row["aux"]) for row in result["rows"]] == [(n, aux) for aux in (True, False) for n in EVERY]
    assert all(row["dead"] > 0.1 and row["mean_ms"] > 0 and row["fve"] > 0 for row in result["rows"])
    assert result["rows"][0]["time"] == 1 and result["rows"][0]["revived"] > 0
    text = readme.fill("<!-- bench: dead -->\n<!-- end bench -->\n", tmp_path)
    assert "came back to life" in text and text.count("\n|") == 2 + len(result["rows"])


def test_the_widest_case_trains_before_it_is_timed(monkeypatch):
    pytest.importorskip("triton")
    from bench.widest import Trained, widest_cases

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    (case,) = widest_cases(shapes.TINY[0], torch.float32, steps=5)
    call = case.build(torch.device("cpu"))
    assert isinstance(call, Trained) and call.about["loss_last"] < call.about["loss_first"]
    assert float(call()) < call.about["loss_first"]
    with pytest.raises(checks.WrongResult, match="does not fall"):
        next(widest_cases(shapes.TINY[0], torch.float32, steps=1)).build(torch.device("cpu"))


def test_a_step_over_its_goal_is_told():
    from bench.steps import GOALS, missed

    (variant, shape, dtype), goals = next(iter(GOALS.items()))
    row = {"variant": variant, "shape": shape, "dtype": dtype, "gemms": goals["gemms"] + 0.1}
    assert missed(row) == [f"gemms {row['gemms']:.2f}, goal {goals['gemms']:g}"]
    assert missed(row | {"gemms": goals["gemms"]}) == [] == missed(row | {"shape": "tiny"})
