"""`fastsae attribute` and `automata`: contributions against attribution and ablation themselves, and the verbs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis.ablation import ablation
from fastsae.analysis.attribution import attribution
from fastsae.analysis.contributions import AttributeConfig, contributions
from fastsae.cli import main
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.sae import SAE
from tests import tiny_lm
from tests.analysis_case import documents
from tests.test_analysis_all_effects import GPT, sae_for, token_ids

TOKENIZER = tiny_lm.tokenizer()
HOOK = "transformer.h.0"


def test_of_prompts_of_several_lengths():
    sae = sae_for(GPT, HOOK, token_ids())
    prompts = ("the cat sat on a mat", "قطة على", "a dog")
    found = contributions(sae, GPT, TOKENIZER, HOOK, prompts=prompts, top=6, places=30)
    rows = [torch.tensor([0, *TOKENIZER(text)["input_ids"]]) for text in prompts]
    total, loss = torch.zeros(30), 0.0
    for row in rows:
        part = attribution(sae, GPT, HOOK, row[None])
        total += part.by_feature()
        loss += part.target
    assert found.tokens == sum(len(row) - 1 for row in rows) and found.loss == pytest.approx(loss / found.tokens)
    assert [row.feature for row in found.rows] == total.abs().argsort(descending=True)[:6].tolist()
    for row in found.rows:
        assert row.predicted == pytest.approx(-float(total[row.feature]), rel=1e-3, abs=1e-4)
        changes = ablation(sae, GPT, HOOK, rows, [row.feature] * 3)
        assert row.measured == pytest.approx(sum(float(change.sum()) for change in changes), rel=1e-3, abs=1e-4)
        active = [sae.encode(activations(GPT, HOOK, ids[None]))[0, 1:, row.feature].detach() for ids in rows]
        assert row.fires == sum(int((f > 0).sum()) for f in active)
        assert row.maximum == pytest.approx(max(float(f.max()) for f in active), rel=1e-4)
        assert row.position > 0 and row.text == found.texts[row.context][row.position]
        at = dict(attribution(sae, GPT, HOOK, rows[row.context][None]).at(0, row.position))
        assert row.feature in at
    agreed = found.agreement
    assert agreed is not None and len(agreed.measured) == 30
    for context, position in zip(agreed.contexts, agreed.positions, strict=True):
        assert 0 < position < len(rows[context]) - 1  # not at the begin-of-text token, nor in the padding
    assert f"Pearson {agreed.pearson:.3f}" in str(found) and len(str(found).splitlines()) == 9
    json.dumps(found.to_dict(), allow_nan=False)


def test_of_contexts_drawn_from_documents():
    sae = sae_for(GPT, HOOK, token_ids())
    found = contributions(sae, GPT, TOKENIZER, HOOK, documents(), contexts=5, context=24, features=(3, 17), seed=2)
    assert found.tokens == 5 * 23 and sorted(row.feature for row in found.rows) == [3, 17]
    assert len({"".join(text) for text in found.texts}) == 5
    with torch.no_grad():
        sae.encoder.bias.sub_(1e6)
    silent = contributions(sae, GPT, TOKENIZER, HOOK, documents(), contexts=2, context=24)
    assert silent.rows == [] and silent.agreement is None and "too few" in str(silent)


def test_what_cannot_be_meant():
    sae = sae_for(GPT, HOOK, token_ids())
    cases: list[tuple[str, Any]] = [
        ("from 0 to 29, got 30", {"features": (30,), "prompts": ("the cat",)}),
        ("none comes twice", {"features": (3, 3)}),
        ("places must be at least 3", {"places": 2}),
        ("no token to be predicted", {"prompts": ("",)}),
        ("at most 64 tokens", {"prompts": ("cat" * 30,)}),
        ("no document fills a context of 60", {"documents": ["the cat"], "context": 60}),
    ]
    for message, arguments in cases:
        with pytest.raises(FastSAEError, match=message):
            contributions(sae, GPT, TOKENIZER, HOOK, **arguments)
    with pytest.raises(FastSAEError, match="several lengths"):
        bare = tiny_lm.tokenizer()
        bare.bos_token = bare.eos_token = None
        contributions(sae, GPT, bare, HOOK, prompts=("the", "a cat"))
    assert AttributeConfig().prompts == ()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], SAE]:
    """The options that name dictionary, model and text."""
    folder = tmp_path_factory.mktemp("effects")
    sae = sae_for(GPT, HOOK, token_ids())
    sae.save_pretrained(folder / "sae")
    GPT.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(200)), encoding="utf-8")
    options = ["--sae", str(folder / "sae"), "--model", str(folder / "model"), "--hook", HOOK, "--text", str(text)]
    return options, sae


def test_attribute_from_the_command_line(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, sae = saved
    argv = ["attribute", *options, "--prompts", "the cat sat", "a dog", "--top", "3", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    wanted = contributions(sae, GPT, TOKENIZER, HOOK, prompts=("the cat sat", "a dog"), top=3)
    assert shown.splitlines()[1].split() == ["feature", "fires", "maximum", "attribution", "ablation", "most", "at"]
    assert [int(line.split()[0]) for line in shown.splitlines()[2:5]] == [row.feature for row in wanted.rows]
    written = json.loads((tmp_path / "out" / "attribute.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(written["agreement"]["measured"], wanted.to_dict()["agreement"]["measured"], atol=1e-4)
    assert main([*argv, "--json"]) == 0  # the same command again
    assert json.loads(capsys.readouterr().out)["features"] == written["features"]
    assert main([*argv, "--seed", "1"]) == 2
    assert "another run" in capsys.readouterr().err
    assert main(["attribute", *options, "--contexts", "2", "--context", "24"]) == 0
    assert "46 tokens in 2 contexts" in capsys.readouterr().out
    assert main(["attribute", *options, "--prompts", "a cat", "--features", "30"]) == 2
    assert capsys.readouterr().err == "fastsae: features must be numbers from 0 to 29, got 30\n"


def test_automata_from_the_command_line(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["automata", *saved[0], "--out", str(tmp_path / "out"), "--context", "24", "--min-excess", "0.02"]
    assert main([*argv, "--min-logit", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "out" / "automata.json").read_text(encoding="utf-8"))
    assert len(written["nodes"]) == said["states"] and len(written["edges"]) == said["transitions"] > 0
    assert all("text" in edge and edge["token"] < 257 for edge in written["edges"])
    source = written["edges"][0]["source"]
    chain = said[f"chain from {source}"]
    assert chain.startswith(f"{source} –") and re.search(r"  \(excess, held out: -?[\d.]+(, -?[\d.]+)*\)$", chain)
    assert said["median excess, held out"] == written["held_out"]["excess_held_out"]
    assert said["median excess"] >= 0.02 and 0 < said["share kept, held out"] == written["held_out"]["kept"] <= 1
    start = ["--min-logit", "0", "--start", str(source), "--length", "2"]
    assert main([*argv, *start]) == 0
    shown = capsys.readouterr().out
    assert f"chain from {source}" in shown and shown.count("chain from") == 1 and shown.count("→") <= 2
    assert main([*argv, "--min-logit", "0", "--start", "99"]) == 2
    assert "features must be numbers from 0 to 29, got 99" in capsys.readouterr().err
    assert main([*argv, "--length", "0"]) == 2
    assert capsys.readouterr().err == "fastsae: length must be at least 1 transition, got 0\n"
