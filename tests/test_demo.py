import json
import subprocess
import sys

import pytest


def run(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastsae.cli", *map(str, args)], capture_output=True, text=True, timeout=600, **options
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    done = run("demo", "--out", out, "--scale", "tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_tiny_leaves_a_report_results_and_figures(demo):
    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert results["categories"] and all(
        f"{row['name']}: feature {row['feature']}" in page for row in results["categories"]
    )
    assert all(
        (demo / name).read_bytes().startswith(b"\x89PNG") for name in ("density.png", "features_and_neurons.png")
    )
    for branch in ("a", "b"):
        quality = results["quality"][branch]
        assert quality["lm"]["val_loss"] < quality["lm"]["unigram"]
        assert quality["eval"]["fve"] > 0 and quality["eval"]["ce_zero"] > quality["eval"]["ce_raw"]
    assert results["universality"]["count"] > 0 and len(results["goals"]) >= 5


def test_features_are_scored_on_other_documents_than_they_were_chosen_on(demo):
    from fastsae import corpus
    from fastsae.analysis.text import scoring_half

    heldout = corpus.builtin("heldout")
    scored = scoring_half(heldout)
    for kind in {document.kind for document in heldout}:
        halves = [half for document, half in zip(heldout, scored, strict=True) if document.kind == kind]
        assert abs(2 * sum(halves) - len(halves)) <= 1, kind
    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    for row in results["categories"]:
        assert row["advantage"] == pytest.approx(row["pearson"] - row["neuron_pearson"])
        assert sum(row["bins"]["inside"]) + sum(row["bins"]["outside"]) > 0


def test_a_second_run_reuses_every_stage_and_says_so(demo):
    before = (demo / "lm-a" / "model.safetensors").stat().st_mtime_ns
    again = run("demo", "--out", demo, "--scale", "tiny")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("reused") == 13
    assert (demo / "lm-a" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_scale_is_refused(demo):
    refused = run("demo", "--out", demo, "--scale", "laptop")
    assert refused.returncode == 2
    assert refused.stderr.strip().count("\n") == 0 and "another run (scale: 'tiny' there" in refused.stderr


def test_verbs_work_on_what_the_demo_made(demo, tmp_path):
    scored = run("eval", "--sae", demo / "sae-a", "--model", demo / "lm-a", "--tokens", 2000, "--context", 64, "--json")
    assert scored.returncode == 0, scored.stderr
    assert 0 < json.loads(scored.stdout)["fve"] < 1
    trained = run(
        "train", "--store", demo / "store-a", "--out", tmp_path / "sae", "--activation", "topk", "--k", 8,
        "--d-sae", 128, "--tokens", 8192, "--batch-size", 512, "--json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["l0"] <= 8
    for args, message in [
        (("train", "--store", demo / "store-a", "--out", tmp_path / "sae"), "another run"),
        (
            ("train", "--store", demo / "store-a", "--out", tmp_path / "k", "--k", 500, "--d-sae", 64),
            "k must be at most",
        ),
        (("train", "--store", tmp_path / "absent", "--out", tmp_path / "x"), "absent"),
        (("train", "--store", demo / "store-a", "--out", tmp_path / "d", "--d-in", 32), "width 64, got d_in=32"),
        (
            (
                "harvest",
                "--model",
                demo / "lm-a",
                "--out",
                tmp_path / "h",
                "--hook",
                "transformer.h.0.mpl.act",
                "--context",
                64,
            ),
            "mlp.act",
        ),
        (("eval", "--sae", demo / "sae-a", "--model", tmp_path / "none"), "causal LM"),
    ]:
        refused = run(*args)
        assert refused.returncode == 2, (args, refused.stderr)
        assert message in refused.stderr and "Traceback" not in refused.stderr


def test_its_figures_become_the_readme_table(demo, tmp_path, capsys):
    from bench.__main__ import main

    assert main(["demo", "--run", str(demo), "--out", str(tmp_path / "demo-tiny.json")]) == 0
    (tmp_path / "README.md").write_text("<!-- bench: demo -->\n<!-- end bench -->\n")
    assert main(["readme", "--file", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    for row in results["categories"]:
        assert f"| {row['name']} | {row['base_rate']:.2%} | {row['pearson']:.2f} |" in text
    for goal in results["goals"]:
        assert f"| {goal['name']} | {goal['value']} | {goal['goal']} |" in text
    assert main(["demo", "--run", str(tmp_path)]) == 2 and "make demo" in capsys.readouterr().out
