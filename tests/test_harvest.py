"""Harvesting: every stored row is the activation of its token; special tokens never are; nothing is computed twice."""

from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch

import fastsae
from fastsae.contexts import context_batches
from fastsae.errors import FastSAEError
from fastsae.harvest import HarvestConfig
from fastsae.store import ActivationStore

HOOK = "transformer.h.0.mlp.act"
TOKENIZER = tiny_lm.tokenizer()
END = TOKENIZER.eos_token_id


def run(out: Path, documents: Any = None, model: Any = None, **options: Any) -> ActivationStore:
    settings: dict[str, Any] = {"hook": HOOK, "tokenizer": TOKENIZER, "context": 32, "shard_rows": 256, "batch_size": 4}
    documents = tiny_lm.documents() if documents is None else documents
    settings |= {"documents": documents, "out": out, "show_progress": False} | options
    return fastsae.harvest(model or tiny_lm.model(), **settings)


def everything(store: ActivationStore):
    return store.read(0, store.count)


def test_cut_documents_give_the_activations_of_their_own_tokens(tmp_path):
    documents, model = tiny_lm.documents(10, words=12), tiny_lm.model()
    rows = everything(run(tmp_path / "s", documents, model, packing="cut"))
    assert len(rows.x) == sum(len(TOKENIZER(text).input_ids) for text in documents)
    outputs = []
    model.transformer.h[0].mlp.act.register_forward_hook(lambda _m, _i, out: outputs.append(out[0]))
    for row in range(0, len(rows.x), 29):
        ids = TOKENIZER(documents[int(rows.documents[row])]).input_ids
        place = int(rows.positions[row])
        assert ids[place] == rows.token_ids[row]
        begin = place // 31 * 31  # a context is the begin-of-text token and 31 others
        with torch.no_grad():
            model(torch.tensor([[END, *ids[begin : place + 1]]]))
        torch.testing.assert_close(rows.x[row], outputs[-1][-1], atol=1e-5, rtol=1e-5)


def test_concatenated_documents_fill_their_contexts():
    documents = tiny_lm.documents(7, words=9) + ["", "x"]
    batches = list(context_batches(TOKENIZER, documents, context=16, batch_size=3))
    ids = torch.cat([b.token_ids for b in batches if b.token_ids.shape[1] == 16])
    assert (ids[:, 0] == END).all()
    stream = [token for text in documents if text for token in [*TOKENIZER(text).input_ids, END]]
    assert ids[:, 1:].flatten().tolist() == stream[: ids[:, 1:].numel()]
    for batch in batches:
        for row, column in batch.keep.nonzero().tolist()[::11]:
            text = TOKENIZER(documents[int(batch.documents[row, column])]).input_ids
            assert text[int(batch.positions[row, column])] == batch.token_ids[row, column]
    assert sum(int(b.keep.sum()) for b in batches) == len(stream) - 8


def test_special_tokens_and_padding_are_never_stored(tmp_path):
    documents = [*tiny_lm.documents(5), "short", "with <|end|> inside", "é"]
    for packing in ("concat", "cut"):
        rows = everything(run(tmp_path / packing, documents, packing=packing))
        assert not (rows.token_ids == END).any()
        assert len(rows.x) == sum(i != END for text in documents for i in TOKENIZER(text).input_ids)
        pairs = torch.stack([rows.documents, rows.positions], 1)
        assert len(pairs.unique(dim=0)) == len(pairs)


def test_without_begin_of_text_the_first_tokens_can_be_left_out(tmp_path):
    tokenizer, documents = tiny_lm.tokenizer(bos=False), tiny_lm.documents(4)
    rows = everything(run(tmp_path / "s", documents, tokenizer=tokenizer, packing="cut", skip_first=2))
    assert set(rows.positions.tolist()).isdisjoint({0, 1, 32, 33})
    assert {2, 34} <= set(rows.positions.tolist())


def test_tokens_per_context_are_drawn_at_random(tmp_path):
    store = run(tmp_path / "s", tokens_per_context=5, packing="cut", skip_first=3)
    rows = everything(store)
    context = rows.documents * 1000 + rows.positions // 31
    per_context = torch.bincount(context)
    assert set(per_context[per_context > 0].tolist()) <= set(range(1, 6)) and per_context.max() == 5
    assert len((rows.positions % 31).unique()) > 20
    again = everything(run(tmp_path / "t", tokens_per_context=5, packing="cut", skip_first=3))
    assert torch.equal(rows.x, again.x)
    other = everything(run(tmp_path / "u", tokens_per_context=5, packing="cut", skip_first=3, seed=1))
    assert not torch.equal(rows.positions, other.positions)


def test_tokens_bounds_the_store_and_meta_says_what_it_is(tmp_path):
    store = run(tmp_path / "s", tokens=777, dtype="bfloat16")
    assert store.count == 777 and store.dtype == torch.bfloat16
    assert store.meta["hook"] == HOOK and store.meta["context"] == 32 and store.meta["packing"] == "concat"


def test_a_stream_is_read_no_further_than_needed(tmp_path):
    read = []

    def stream():
        for text in tiny_lm.documents(400):
            read.append(text)
            yield text

    assert run(tmp_path / "s", stream(), tokens=500, tokens_per_context=20).count == 500  # 25 contexts of 32 tokens
    assert len(read) <= 128


def test_a_stream_of_documents_and_objects_with_text(tmp_path):
    class Document:
        def __init__(self, text):
            self.text = text

    documents = tiny_lm.documents(8)
    store = run(tmp_path / "s", (Document(text) for text in documents))
    assert store.count == sum(len(TOKENIZER(text).input_ids) for text in documents)


def test_the_forward_pass_ends_at_the_module(tmp_path):
    model, ran = tiny_lm.model(), []
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    model.transformer.h[1].register_forward_hook(lambda *_: ran.append("h.1"))
    model.train()
    run(tmp_path / "s", model=model)
    assert ran == [] and model.training


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("passes", [1, 5, 9, 15])
def test_interrupted_and_resumed_gives_equal_bytes(tmp_path, passes):
    options: dict[str, Any] = {"tokens_per_context": 20, "tokens": 1500}
    whole = run(tmp_path / "whole", **options)
    model, count = tiny_lm.model(), [0]

    def stop(*_):
        count[0] += 1
        if count[0] > passes:
            raise Interrupted

    model.transformer.h[0].register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", model=model, **options)
    if passes > 1:
        with pytest.raises(FastSAEError, match="another run.*seed"):
            run(tmp_path / "cut", resume=True, seed=5, **options)
    else:
        assert not (tmp_path / "cut").exists()  # nothing was stored: the folder is free for any run
    resumed = run(tmp_path / "cut", resume=True, **options)
    for file in whole.path.iterdir():
        assert file.read_bytes() == (resumed.path / file.name).read_bytes(), file.name


def test_a_resumed_run_skips_what_is_stored(tmp_path):
    run(tmp_path / "s")
    (tmp_path / "s/index.json").unlink()
    model, passes = tiny_lm.model(), []
    model.transformer.h[0].register_forward_hook(lambda *_: passes.append(1))
    store = run(tmp_path / "s", model=model, resume=True)
    assert len(passes) <= 1 + 3  # the one that tells the width, and what is behind the last full shard
    model.transformer.h[0].register_forward_hook(lambda *_: pytest.fail("ran again") if len(passes) > 5 else None)
    assert run(tmp_path / "s", model=model, resume=True).count == store.count  # the finished store, as it is
    with pytest.raises(FastSAEError, match="resume it"):
        run(tmp_path / "s")
    with pytest.raises(FastSAEError, match="another run.*context"):
        run(tmp_path / "s", resume=True, context=16)
    with pytest.raises(FastSAEError, match="another run.*documents"):
        run(tmp_path / "s", ["other text"], resume=True)


def test_bad_input_is_one_clear_line(tmp_path):
    cases: list[tuple[str, dict[str, Any]]] = [
        ("expected text, found none", {"documents": []}),
        ("expected text, found none", {"documents": ["", ""]}),
        ("put it into a list", {"documents": "one long string"}),
        ("a document is a string", {"documents": [3]}),
        ("did you mean 'transformer.h.0.mlp.act'", {"hook": "transformer.h.0.mlp.axt"}),
        ("the model reads at most 64 tokens, got a context of 65", {"context": 65}),
        ("context must be at least 1", {"context": 0}),
        ("skip_first must be in", {"skip_first": 32}),
        ("did you mean tokens_per_context", {"token_per_context": 3}),
        ("pass the model's tokenizer", {"tokenizer": None}),
        ("at least one token besides", {"context": 1}),
    ]
    for number, (message, options) in enumerate(cases):
        with pytest.raises(FastSAEError, match=message) as caught:
            run(tmp_path / str(number), **options)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.add_tokens(["more"])
    with pytest.raises(FastSAEError, match="258 entries, the model embeds 257"):
        run(tmp_path / "s", tokenizer=tokenizer)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    model = tiny_lm.model()
    model.transformer.wte.weight.data[ord("c") - 32] = float("nan")
    with pytest.raises(FastSAEError, match="NaN or infinity at document"):
        run(tmp_path / "s", model=model)


def test_an_output_of_another_form_is_refused(tmp_path):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.nn.Flatten(0, 1)
            self.unused = torch.nn.ReLU()

        def forward(self, ids):
            return self.part(ids[:, :, None] * torch.ones(4))

    with pytest.raises(FastSAEError, match=r"must be \[contexts, tokens, width\]"):
        run(tmp_path / "s", model=Flat(), hook="part")
    with pytest.raises(FastSAEError, match="does not run unused"):
        run(tmp_path / "t", model=Flat(), hook="unused")


def test_config_and_options_agree():
    with pytest.raises(FastSAEError, match="tokens must be at least 1"):
        HarvestConfig(tokens=0)
