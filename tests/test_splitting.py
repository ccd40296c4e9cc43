"""The graph over dictionaries of growing width, against cosines of dense columns and a planted split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastsae import figures
from fastsae.analysis.follows import follows
from fastsae.analysis.splitting import Split, SplitConfig, Splitting, map_of, split
from fastsae.analysis.stream import Source
from fastsae.analysis.text import scoring_half
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from tests import analysis_case as case


def graph(*dense: torch.Tensor, parts: int = 3, **options: Any) -> Split:
    """Of codes given as dense columns [n, F], streamed in parts."""
    splitting = Splitting([f.shape[1] for f in dense], SplitConfig(**options))
    for chunks in zip(*(f.chunk(parts) for f in dense), strict=True):
        splitting.add([SparseCode.from_dense(chunk) for chunk in chunks])
    return splitting.result()


def planted(n: int = 3000) -> list[torch.Tensor]:
    """Feature 0 splits in two, one of which splits in two again; feature 1 stays; feature 2 of the last is rare."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(4, (n,), generator=generator)  # three kinds of one thing, and another thing
    value = torch.rand(n, generator=generator) + 0.5
    on = torch.rand(n, generator=generator) < 0.3
    k = [value * on * (kind == i) for i in range(4)]
    one = torch.stack([k[0] + k[1] + k[2], k[3]], 1)
    two = torch.stack([k[3], k[0], k[1] + k[2]], 1)
    three = torch.stack([k[2], 2 * k[1], torch.zeros(n), k[3], k[0]], 1)
    three[:3, 2] = 1.0
    return [one, two, three]


def test_a_planted_split_is_found():
    found = graph(*planted())
    assert found.widths == (2, 3, 5) and found.tokens == 3000
    assert found.descendants(0, 0) == {0: [0], 1: [1, 2], 2: [0, 1, 4]}
    assert found.descendants(0, 1) == {0: [1], 1: [0], 2: [3]}
    assert found.descendants(1, 2) == {1: [2], 2: [0, 1]}
    assert [f for f, _ in found.parents(2, 0)] == [2] and found.parents(0, 0) == [] == found.children(2, 0)
    rare = torch.zeros(100, 1)
    rare[:3] = 1.0  # three tokens are too few to tell, whichever side they are on
    common = rare + 0.01
    assert graph(rare, common).children(0, 0) == [] == graph(common, rare).children(0, 0)
    assert len(graph(rare, common, min_fires=3).children(0, 0)) == 1
    assert found.summary()[0] == {"edges": 3, "parents": 2, "mean_children": 1.5, "most": 2.0}


def test_cosines_are_over_tokens_where_one_fires():
    a, b, _ = planted()
    found = graph(a, b, threshold=0.05)
    for i in range(2):
        children = dict(found.children(0, i))
        for j in range(3):
            x, y = a[:, i].double().numpy(), b[:, j].double().numpy()
            either = (x > 0) | (y > 0)
            wanted = x[either] @ y[either] / np.linalg.norm(x[either]) / np.linalg.norm(y[either])
            assert (j in children) == (wanted > 0.05)
            if j in children:
                assert children[j] == pytest.approx(wanted, abs=1e-6)
        assert list(children.values()) == sorted(children.values(), reverse=True)
    np.testing.assert_allclose(found.density[1], (b > 0).double().mean(0))


def test_from_text_the_graph_is_that_of_dense_activations():
    sae, model, tokenizer = case.case()
    torch.manual_seed(0)
    wide = SAE(d_in=24, d_sae=60, activation="relu", seed=3, max_l0=2)  # too dense for the sparse path: still read
    texts = case.documents()
    sources = [Source(sae, model, case.HOOK), Source(wide, model, case.HOOK)]
    found = split(sources, tokenizer, texts, context=33, batch_size=4, show_progress=False)
    x = case.neurons(model, case.contexts(tokenizer, texts, 33))
    with torch.no_grad():
        f, g = sae.encode(x).double().numpy(), wide.encode(x).double().numpy()
    norms = np.linalg.norm(f, axis=0)[:, None] * np.linalg.norm(g, axis=0)
    cosine = np.divide(f.T @ g, norms, out=np.zeros_like(norms), where=norms > 0)
    wanted = (cosine > 0.4) & ((f > 0).sum(0) >= 10)[:, None] & ((g > 0).sum(0) >= 10)
    got = np.zeros_like(wanted)
    got[found.edges[0].parents, found.edges[0].children] = True
    assert wanted.sum() > 10 and np.array_equal(got, wanted)


def test_a_graph_is_json_and_back(tmp_path):
    found = graph(*planted())
    found.save(tmp_path / "split.json")
    again = Split.load(tmp_path / "split.json")
    assert again.to_dict() == found.to_dict() and again.descendants(0, 0) == found.descendants(0, 0)
    empty = graph(torch.zeros(20, 2), torch.zeros(20, 3))
    empty.save(tmp_path / "empty.json")
    assert Split.load(tmp_path / "empty.json").descendants(0, 0) == {0: [0], 1: []}


def test_rows_are_compared_block_by_block(monkeypatch):
    from fastsae.analysis import cross, splitting

    whole = graph(*planted(), threshold=0.01)
    monkeypatch.setattr(splitting, "row_blocks", lambda count: cross.row_blocks(count, 2))
    assert graph(*planted(), threshold=0.01).to_dict() == whole.to_dict()


def test_bad_input_is_one_line(tmp_path):
    sae, model, tokenizer = case.case()
    source = Source(sae, model, case.HOOK)
    narrow = Source(SAE(d_in=24, d_sae=8, k=2), model, case.HOOK)
    elsewhere = Source(SAE(d_in=16, d_sae=60, k=2), model, "transformer.h.0")
    found = graph(*planted())
    cases = [
        ("at least two dictionaries", lambda: split([source], tokenizer, ["a b"])),
        ("from the narrowest to the widest", lambda: split([source, narrow], tokenizer, ["a b"])),
        ("one module of one model", lambda: split([source, elsewhere], tokenizer, ["a b"])),
        ("raise memory", lambda: split([narrow, source], tokenizer, ["a b"], memory=1e-9)),
        ("threshold must be between", lambda: SplitConfig(threshold=1.5)),
        ("layer must be from 0 to 2", lambda: found.children(3, 0)),
        ("features of layer 0 are 0 to 1", lambda: found.descendants(0, 2)),
        ("run split again", lambda: Split.load(tmp_path / "none.json")),
        ("one width D", lambda: map_of([torch.ones(4, 3), torch.ones(4, 2)])),
        ("at least 4 features", lambda: map_of([torch.ones(3, 3)])),
    ]
    for message, action in cases:
        with pytest.raises(FastSAEError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.slow  # umap compiles itself for 20 s
def test_a_map_puts_clusters_of_directions_apart(tmp_path):
    pytest.importorskip("umap")
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=1)
    kinds = [torch.arange(size) % 4 for size in (40, 80)]
    scale = [torch.rand(len(kind), 1, generator=generator) + 0.1 for kind in kinds]  # a cosine does not see it
    rows = [
        s * (centres[kind] + 0.05 * torch.randn(len(kind), 32, generator=generator))
        for kind, s in zip(kinds, scale, strict=True)
    ]
    keep = [torch.arange(40) >= 4, torch.arange(80) >= 4]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # umap's numba would set all that there are
    found = map_of(rows, keep, seed=1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    kind = torch.cat([k[m] for k, m in zip(kinds, keep, strict=True)]).numpy()
    assert found.points.shape == (112, 2) and found.layer.tolist() == [0] * 36 + [1] * 76
    assert found.feature[:2].tolist() == [4, 5] and found.feature[36] == 4
    for number in range(4):  # both dictionaries' rows of a kind are one cluster
        assert len(set(found.clusters[kind == number].tolist())) == 1
    assert len(set(found.clusters.tolist())) == 4 and found.clusters.min() == 0
    assert np.array_equal(map_of(rows, keep, seed=1).points, found.points)
    values = np.linspace(1e-4, 1e-1, 112)
    figures.feature_map(
        found.points, values, "density", tmp_path / "map.png", layers=found.layer, clusters=found.clusters, log=True
    )
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_figures_of_maps_of_any_values(tmp_path):
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).numpy()
    for name, values in (("same", np.zeros(30)), ("some", np.linspace(-1, 1, 30))):
        figures.feature_map(points, values, "r with Arabic", tmp_path / f"{name}.png", clusters=np.full(30, -1))
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_matches_and_densities(tmp_path):
    values = {"features": np.array([0.2, 0.9, np.nan]), "neurons": np.array([0.1]), "none": np.array([np.nan])}
    figures.best_matches(values, tmp_path / "matches.png")
    figures.density([1, 5, 9], [-3, -2, -1, 0], tmp_path / "density.png", ultra_low=[1, 0, 0])
    for name in ("matches", "density"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # umap compiles itself for 20 s
def test_the_verb_writes_graph_and_map(tmp_path, capsys):
    import json

    from fastsae import cli

    pytest.importorskip("umap")
    sae, model, tokenizer = case.case()
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    sae.save_pretrained(tmp_path / "narrow")
    SAE(d_in=24, d_sae=60, activation="relu", seed=3).save_pretrained(tmp_path / "wide")
    texts = [{"text": f"{text} {i}"} for i, text in enumerate(case.documents() * 9)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    argv = ["split", "--categories", "Arabic", "DNA"]
    argv += ["--saes", str(tmp_path / "narrow"), str(tmp_path / "wide"), "--model", str(tmp_path / "lm")]
    argv += ["--hook", case.HOOK, "--text", str(tmp_path / "text.jsonl"), "--context", "33", "--out"]
    capsys.readouterr()
    assert cli.main([*argv, str(tmp_path / "out"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = Split.load(tmp_path / "out" / "split.json")
    assert found.widths == (40, 60) and found.tokens == shown["tokens"]
    drawn = json.loads((tmp_path / "out" / "map.json").read_text())
    assert len(drawn["points"]) == sum(int((part > 0).sum()) for part in found.density) == len(drawn["density"])
    assert (tmp_path / "out" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "map-categories.png").read_bytes().startswith(b"\x89PNG")
    assert drawn["categories"] == ["Arabic", "DNA"]
    assert len(drawn["category"]) == len(drawn["r"]) == len(drawn["points"])


def test_which_category_a_feature_follows():
    """Chosen on one half of the documents and scored on the other, against numpy on all activations."""
    sae, model, tokenizer = case.case()
    wide = SAE(d_in=24, d_sae=60, activation="relu", seed=3)
    texts, hook = case.documents(30), case.HOOK
    found = follows(
        [Source(sae, model, hook), Source(wide, model, hook)], tokenizer, texts, ("Arabic", "Latin"), context=33,
        batch_size=7, show_progress=False,
    )  # fmt: skip
    x = case.neurons(model, case.contexts(tokenizer, texts, 33))
    half = np.array([h for text, h in zip(texts, scoring_half(texts), strict=True) for _ in text.encode()])
    arabic = np.array([c > "\u0590" for text in texts for c in text for _ in c.encode()])
    latin = np.array([c.isascii() and c.isalpha() for text in texts for c in text for _ in c.encode()])
    assert found.names == ("Arabic", "Latin")
    for dictionary, best, r in zip((sae, wide), found.best, found.r, strict=True):
        f = dictionary.eval().encode(x).detach().double().numpy()
        for j in range(f.shape[1]):
            if min(np.ptp(f[half, j]), np.ptp(f[~half, j])) < 1e-9:
                continue
            scores = [np.corrcoef(f[~half, j], member[~half])[0, 1] for member in (arabic, latin)]
            assert best[j] == int(np.argmax(scores))
            member = (arabic, latin)[int(best[j])]
            assert float(r[j]) == pytest.approx(np.corrcoef(f[half, j], member[half])[0, 1], abs=1e-6)
