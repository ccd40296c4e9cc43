import json
import math

import numpy as np
import pytest
import torch

from fastsae import baselines, corpus, lm
from fastsae.errors import FastSAEError

TINY = lm.LMConfig(vocab_size=320, d_model=16, d_mlp=32, n_heads=2, context=16, tokens=4096, batch_tokens=64, seed=3)


@pytest.fixture(scope="module")
def documents():
    return [d for d in corpus.builtin() if d.kind in ("Thai", "dna", "Greek")]


def run(documents, out, config=TINY, **options):
    train, heldout = corpus.split_of(documents, "train"), corpus.split_of(documents, "heldout")
    return lm.train(train, heldout, config, out, **options)


def test_a_trained_model_beats_its_start_and_loads_with_auto_model(documents, tmp_path):
    results = run(documents, tmp_path / "lm")
    assert results["val_loss"] < math.log(320) - 0.5
    assert results["bigram"] < results["unigram"] < math.log(320)
    assert json.loads((tmp_path / "lm" / "lm.json").read_text())["val_loss"] == results["val_loss"]
    model, tokenizer = lm.load(tmp_path / "lm")
    text = "ข้อ ๑ Ἀρχή ACGT"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.get_submodule(lm.MLP_HOOK) is not None and model.config.n_layer == 1
    stream = lm.encode(tokenizer, corpus.split_of(documents, "heldout"))
    assert lm.validation_loss(model, stream, 16, tokenizer.bos_token_id) == pytest.approx(results["val_loss"], abs=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(documents, tmp_path):
    config = lm.LMConfig(**{**vars(TINY), "checkpoint_every": 10, "tokens": 64 * 40})
    run(documents, tmp_path / "whole", config)

    def stop(step, steps, row):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(documents, tmp_path / "cut", config, on_step=stop)
    with pytest.raises(FastSAEError, match="resume"):
        run(documents, tmp_path / "cut", config)
    run(documents, tmp_path / "cut", config, resume=True)
    whole, cut = lm.load(tmp_path / "whole")[0].state_dict(), lm.load(tmp_path / "cut")[0].state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_seeds_change_the_model_and_not_the_tokenizer(documents, tmp_path):
    run(documents, tmp_path / "a")
    run(documents, tmp_path / "b", lm.LMConfig(**{**vars(TINY), "seed": 4}))
    (model_a, tokenizer_a), (model_b, tokenizer_b) = lm.load(tmp_path / "a"), lm.load(tmp_path / "b")
    assert tokenizer_a.get_vocab() == tokenizer_b.get_vocab()
    assert not torch.equal(model_a.lm_head.weight, model_b.lm_head.weight)


def test_a_rare_script_gets_tokens_of_its_own():
    arabic = [d for d in corpus.builtin("train") if d.kind == "Arabic"]
    documents = arabic + [d for d in corpus.builtin("train") if d.kind == "gutenberg"][:400]
    tokenizer = lm.train_tokenizer(documents, 1024)
    tokens = sum(len(ids) for ids in tokenizer([d.text for d in arabic])["input_ids"])
    assert tokens < 1.1 * sum(len(d.text) for d in arabic)  # two bytes a letter would be about 1.8 tokens a character


def test_another_run_in_the_folder_is_refused_by_name(documents, tmp_path):
    run(documents, tmp_path / "lm")
    with pytest.raises(FastSAEError, match=r"another run \(lm.seed: 3 there, 5 asked for\)"):
        run(documents, tmp_path / "lm", lm.LMConfig(**{**vars(TINY), "seed": 5}), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FastSAEError, match="not an empty folder"):
        run(documents, tmp_path / "mine")


def test_a_finished_run_is_reused_and_another_text_is_another_run(documents, tmp_path):
    first = run(documents, tmp_path / "lm")
    log = (tmp_path / "lm" / "log.jsonl").read_text()
    assert run(documents, tmp_path / "lm", resume=True) == first
    assert (tmp_path / "lm" / "log.jsonl").read_text() == log
    with pytest.raises(FastSAEError, match="another run.*text"):
        run(documents[1:], tmp_path / "lm", resume=True)


def test_a_device_that_is_not_there_is_said(documents, tmp_path):
    with pytest.raises(FastSAEError, match="device must be auto, cpu or one that torch can use here, got 'banana'"):
        run(documents, tmp_path / "lm", device="banana")


def test_a_full_disk_is_said(documents, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(FastSAEError, match="no space left for the model in .*full.* resume"):
        run(documents, tmp_path / "full")


def test_too_little_text_is_said(tmp_path):
    few = [corpus.document("short text, " + str(i)) for i in range(40)]
    with pytest.raises(FastSAEError, match="a vocabulary of 2048 needs more text"):
        lm.train(few, few, lm.LMConfig(vocab_size=2048), tmp_path / "a")
    tokenizer = lm.train_tokenizer([d for d in corpus.builtin() if d.kind == "Thai"], 300)
    with pytest.raises(FastSAEError, match="training text has .* tokens"):
        lm.train(few[:2], few, lm.LMConfig(vocab_size=300, context=128), tmp_path / "b", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 100), ("d_model", 130), ("context", 4), ("tokens", 0), ("batch_tokens", 1), ("init_std", -1)],
)
def test_config_refuses_what_cannot_be_meant(field, value):
    with pytest.raises(FastSAEError, match=str(value)):
        lm.LMConfig(**{field: value})


def test_bigram_baseline_against_a_direct_computation():
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 7, 400), rng.integers(0, 9, 50)  # ids 7 and 8 are never seen
    best = math.inf
    unigram = (np.bincount(train, minlength=9) + 1.0) / (400 + 9)
    for kappa in (0.25, 0.5, 1.0, 2.0, 4.0):
        total = 0.0
        for a, b in zip(heldout[:-1], heldout[1:], strict=True):
            after = train[1:][train[:-1] == a]
            back = max(kappa * len(set(after)), 1e-9)
            total -= math.log(((after == b).sum() + back * unigram[b]) / (len(after) + back))
        best = min(best, total / 49)
    result = baselines.losses(train, heldout, 9)
    assert result["bigram"] == pytest.approx(best)
    assert result["unigram"] == pytest.approx(-np.log(unigram[heldout]).mean())
