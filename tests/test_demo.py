import json
import subprocess
import sys
import unicodedata
from typing import Any

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


@pytest.fixture(scope="module")
def raw(demo, tmp_path_factory):
    """Of the demo's held-out text."""
    from fastsae import corpus
    from fastsae.demo import SCALES

    return recomputed(demo, corpus.builtin("heldout")[:: SCALES["tiny"].every], tmp_path_factory.mktemp("raw"))


def recomputed(demo, heldout, folder, branches="ab") -> dict[str, Any]:
    """The text's activations from a store, and all that this file computes from them by itself, in numpy."""
    import numpy as np
    from safetensors.numpy import load_file

    import fastsae
    from fastsae import lm

    found: dict[str, Any] = {"documents": heldout}
    for branch in branches:
        model, tokenizer = lm.load(demo / f"lm-{branch}")
        store = fastsae.harvest(model, tokenizer, heldout, lm.MLP_HOOK, folder / branch, packing="cut", context=64,
                                dtype="float32", show_progress=False)  # fmt: skip
        rows = store.read(0, store.count)
        order = np.lexsort((rows.positions.numpy(), rows.documents.numpy()))
        weights = load_file(demo / f"sae-{branch}" / "sae" / "sae.safetensors")
        x = rows.x.numpy()[order]
        y = (x - weights["input_mean"]) * weights["input_scale"] - weights["b_dec"]
        found[branch] = {
            "x": x, "f": np.maximum(y @ weights["encoder.weight"].T + weights["encoder.bias"], 0),
            "ids": rows.token_ids.numpy()[order], "document": rows.documents.numpy()[order],
        }  # fmt: skip
    # Which tokens are Arabic, Cyrillic, …: every character that has a byte in the token has that script's name.
    label = {}
    texts = [document.text for document in heldout]
    pieces = [tokenizer.convert_ids_to_tokens(int(i)) for i in found["a"]["ids"]]
    alphabet = {chr(c): c for c in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    alphabet |= {chr(256 + i): c for i, c in enumerate(c for c in range(256) if c not in alphabet.values())}
    for name in ("Arabic", "Hebrew", "Cyrillic", "Greek", "Devanagari", "Thai"):
        marks, word = [], name.upper()
        for number, text in enumerate(texts):
            of_byte = [word in unicodedata.name(c, "") for c in text for _ in c.encode()]
            space = [c.isspace() for c in text for _ in c.encode()]
            at = 0
            for i in np.flatnonzero(found["a"]["document"] == number):
                length = len([alphabet[c] for c in pieces[i]])
                own = of_byte[at : at + length]
                spaces = space[at : at + length]
                marks.append(any(own) and all(a or b for a, b in zip(own, spaces, strict=True)))
                at += length
        label[name] = np.array(marks)
    found["label"] = label
    found["spelled"] = [bytes(alphabet[c] for c in piece) for piece in pieces]
    return found


def papers(raw) -> dict[str, Any]:
    """The paper's proxies, token by token, in loops."""
    import math

    import numpy as np

    def whole(piece: bytes) -> bool:
        return piece.decode("utf-8", "replace").encode() == piece

    ids, document, spelled, label = raw["a"]["ids"], raw["a"]["document"], raw["spelled"], raw["label"]
    scores: dict[str, Any] = {}
    for name in ("Arabic", "Hebrew"):
        share = {i: label[name][ids == i].mean() for i in set(ids.tolist())}
        given = [float(inside) if whole(piece) else share[i]
                 for i, piece, inside in zip(ids.tolist(), spelled, label[name], strict=True)]  # fmt: skip
        prior = (label[name].sum() + 1) / (len(ids) + 2)
        scores[name] = np.log(np.maximum(given, 1e-10) / prior)
    counts = np.bincount(ids, minlength=512)
    log_p = np.log((counts + 1) / (len(ids) + len(counts)))
    base64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for name, legal, least in (("base64", base64, 1), ("DNA", b"ACGT", 2)):
        found = []
        for n in range(len(ids)):
            best, total = math.log(1e-10), 0.0
            for begin in range(n, -1, -1):
                piece = spelled[begin]
                if document[begin] != document[n] or not piece or not set(piece) <= set(legal):
                    break
                total -= len(piece) * math.log(len(legal)) + log_p[ids[begin]]
                best = max(best, total) if n - begin + 1 >= least else best
            found.append(best)
        scores[name] = np.array(found)
    return scores


def test_reported_scores_are_those_of_the_raw_activations(demo, raw):
    import numpy as np
    import scipy.stats

    from fastsae.analysis import Cards, Survey
    from fastsae.analysis.text import scoring_half

    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    f, x = raw["a"]["f"].astype(np.float64), raw["a"]["x"].astype(np.float64)
    scored = np.array(scoring_half(raw["documents"]))[raw["a"]["document"]]
    assert results["tokens"] == len(f)
    rows = {row["name"]: row for row in results["categories"]}
    cards = Cards(Survey.load(demo / "survey.npz"))
    for name, label in raw["label"].items():
        p = cards.survey.proxies.index(name)
        for half in (0, 1):
            some = scored == bool(half)
            if 0 < label[some].sum():
                with np.errstate(invalid="ignore"):
                    want = np.corrcoef(f[some].T, label[some])[-1, :-1]
                np.testing.assert_allclose(cards.pearson(half)[:, p], np.nan_to_num(want), atol=1e-4, err_msg=name)
        if name not in rows:
            continue
        row, feature = rows[name], rows[name]["feature"]
        choice = [np.corrcoef(f[~scored, k], label[~scored])[0, 1] if f[~scored, k].any() else -1
                  for k in range(f.shape[1])]  # fmt: skip
        assert choice[feature] == pytest.approx(max(choice), abs=1e-4)  # chosen on the other half alone
        on = f[scored, feature] > 0
        inside = label[scored]
        assert row["base_rate"] == pytest.approx(inside.mean(), abs=1e-9)
        assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(f[scored, feature], inside)[0], abs=1e-4)
        assert row["neuron_pearson"] == pytest.approx(
            scipy.stats.pearsonr(x[scored, row["neuron"]], inside)[0], abs=1e-4
        )
        assert row["specificity"] == pytest.approx(inside[on].mean(), abs=2e-3)  # a sum near 0 may round across it
        assert row["recall"] == pytest.approx((on & inside).sum() / inside.sum(), abs=2e-3)
        expected = f[scored, feature][inside].sum() / f[scored, feature].sum()
        assert row["expected"] == pytest.approx(expected, abs=1e-3)
        assert row["density"] == pytest.approx((f[:, feature] > 0).mean(), abs=1e-3)
        assert row["max"] == pytest.approx(f[:, feature].max(), rel=1e-4)
    assert set(rows) & set(raw["label"]) and sum(label.any() for label in raw["label"].values()) >= 3


def test_correlations_with_the_papers_proxies_are_those_of_the_raw_activations(demo, tmp_path):
    import numpy as np

    import fastsae
    from fastsae import corpus, lm
    from fastsae.analysis import AnalyzeConfig, analyze
    from fastsae.analysis.text import scoring_half

    heldout = corpus.builtin("heldout")
    rare = [document for document in heldout if document.kind in ("Arabic", "Hebrew", "b64", "dna")]
    some = rare + [document for document in heldout[::30] if document not in rare]  # too few of them in the demo's text
    config = AnalyzeConfig(("Arabic", "Hebrew", "base64", "DNA", "Thai"), context=64, contexts_per_effect=2,
                           sample_tokens=2, samples=1, control_tokens=5000, explain_features=0)  # fmt: skip
    model, tokenizer = lm.load(demo / "lm-a")
    sae = fastsae.SAE.from_pretrained(demo / "sae-a" / "sae")
    found = analyze(sae, model, tokenizer, some, lm.MLP_HOOK, tmp_path / "new", config, show_progress=False)
    raw = recomputed(demo, some, tmp_path, "a")
    scored = np.array(scoring_half(some))[raw["a"]["document"]]
    wanted = papers(raw)
    rows = {row["name"]: row for row in found["categories"]}
    assert set(wanted) <= set(rows)
    for name, score in wanted.items():
        f, score = raw["a"]["f"].astype(np.float64)[scored, rows[name]["feature"]], score[scored]
        binary, graded = (np.corrcoef(f, proxy)[0, 1] for proxy in (score > 0, score.clip(0)))
        assert rows[name]["pearson_paper"] == pytest.approx(binary, abs=1e-4), name
        assert rows[name]["pearson_paper_clipped"] == pytest.approx(graded, abs=1e-4), name
        assert name == "DNA" or abs(rows[name]["pearson"] - binary) > 0.005, name


def test_universality_is_that_of_dense_correlations(demo, raw):
    import numpy as np

    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    a, b = (raw[branch]["f"].astype(np.float64) for branch in "ab")
    alive = [(part > 0).sum(0) >= 10 for part in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a[:, alive[0]].T, b[:, alive[1]].T)[: alive[0].sum(), alive[0].sum() :]
        x = np.corrcoef(raw["a"]["x"].T, raw["b"]["x"].T)[: raw["a"]["x"].shape[1], raw["a"]["x"].shape[1] :]
    assert results["universality"]["features"] == pytest.approx(np.median(r.max(1)), abs=5e-3)
    moving = raw["a"]["x"].std(0) > 0
    assert results["universality"]["neurons"] == pytest.approx(np.median(np.nanmax(x[moving], 1)), abs=5e-3)
    assert results["universality"]["control"] < results["universality"]["features"]


def test_controls_splitting_and_explanations_are_reported(demo):
    results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert results["splitting"]["widths"] == [128, 256, 512] and all(s["edges"] for s in results["splitting"]["steps"])
    groups = results["explain"]["summary"]
    assert set(groups) == {"features", "neurons", "random directions", "misplaced features", "shuffled model"}
    assert abs(groups["misplaced features"]["spearman"]["mean"]) < 0.15 < groups["features"]["spearman"]["mean"]
    for heading in ("Features split as", "Does another run find", "Can they be explained", "The paper’s analyses"):
        assert heading in page
    for name in ("survey.npz", "match.json", "split.json"):
        assert (demo / name).exists()
