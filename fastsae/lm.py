"""A language model to look into: byte-level BPE and the one-layer transformer of "Towards Monosemanticity".

One attention block and one ReLU MLP, learned positions, untied embeddings: a `GPT2LMHeadModel` with `n_layer=1`, so
that whatever reads Hugging Face folders reads this one. The activations of interest are the MLP's neurons after the
ReLU, at the module path `MLP_HOOK` (width d_mlp).
"""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae import baselines
from fastsae.contexts import documents_digest
from fastsae.corpus import Document
from fastsae.device import choose_device
from fastsae.errors import FastSAEError
from fastsae.files import claim_folder, read_torch, truncate_log, write_json, write_torch
from fastsae.interrupt import uninterrupted
from fastsae.progress import progress

RESULTS = "lm.json"
MLP_HOOK = "transformer.h.0.mlp.act"  # [B, T, d_mlp], after the ReLU
END = "<|endoftext|>"  # stands between documents, and first in every context


@dataclass(frozen=True)
class LMConfig:
    """What to train. The defaults are the demo's laptop scale."""

    vocab_size: int = 2048
    """Entries of the byte-level BPE."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 384
    """MLP neurons."""
    n_heads: int = 4
    """Attention heads."""
    context: int = 128
    """Tokens in a context."""
    tokens: int = 12_000_000
    """Training tokens seen in all."""
    batch_tokens: int = 2048
    """Tokens in an optimizer step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; linear warm-up over 3 % of the steps, then cosine decay to a tenth."""
    init_std: float = 0.0
    """Standard deviation of the initial weights; 0 means 1/√d_model. GPT-2's 0.02 is for a width of 768: at 128 it
    leaves the MLP almost unused (without it the loss rises by 0.6 nats, with 1/√d_model by 3, at the same loss)."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay, on matrices only."""
    seed: int = 0
    """Seeds the initial weights and the order of the data, not the tokenizer and not the held-out set."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_mlp", "n_heads", "tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.init_std < math.inf:
            raise FastSAEError(f"init_std must be a finite number ≥ 0, got {self.init_std}")
        if self.context < 8:
            raise FastSAEError(f"context must be at least 8 tokens, got {self.context}")
        if self.vocab_size < 300:
            raise FastSAEError(f"vocab_size must be at least 300 (256 bytes and some merges), got {self.vocab_size}")
        if self.d_model % self.n_heads:
            raise FastSAEError(f"d_model must be a multiple of n_heads, got {self.d_model} and {self.n_heads}")
        if self.batch_tokens < self.context:
            raise FastSAEError(f"batch_tokens must hold one context of {self.context}, got {self.batch_tokens}")

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch_tokens // self.context * self.context))


def train_tokenizer(documents: list[Document], vocab_size: int):
    """A byte-level BPE as a PreTrainedTokenizerFast, trained on a sample in which rare kinds of text weigh more.

    A kind with n characters is sampled in proportion to n^0.6: letters of a script that makes up 0.5 % of the text
    become tokens of their own, where plain counts would leave them as fragments of UTF-8.
    Raises FastSAEError if the text has fewer merges than vocab_size asks for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_balanced(documents), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise FastSAEError(
            f"a vocabulary of {vocab_size} needs more text: it supports {tokenizer.get_vocab_size()} entries; "
            f"lower vocab_size or give more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def _balanced(documents: list[Document], power: float = 0.6) -> Iterable[str]:
    kinds = defaultdict(list)
    for document in documents:
        kinds[document.kind].append(document.text)
    sizes = {kind: sum(map(len, texts)) for kind, texts in kinds.items()}
    largest = max(sizes.values())
    for kind, texts in kinds.items():
        budget, i = 0.4 * largest * (sizes[kind] / largest) ** power, 0
        if len(kinds) == 1:
            budget = largest
        while budget > 0:
            yield texts[i % len(texts)]
            budget -= max(1, len(texts[i % len(texts)]))
            i += 1


def encode(tokenizer: Any, documents: list[Document]) -> np.ndarray:
    """One stream of token ids, int32 [n]: END, document, END, document, …"""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    stream: list[int] = []
    for item in encoded:
        stream.append(end)
        stream.extend(item.ids)
    return np.array(stream, dtype=np.int32)


def build_model(config: LMConfig, end_id: int):
    """The freshly initialised GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.d_model,
            n_layer=1,
            n_head=config.n_heads,
            n_inner=config.d_mlp,
            activation_function="relu",
            initializer_range=config.init_std or config.d_model**-0.5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=end_id,
            eos_token_id=end_id,
        )
    )
    torch.random.set_rng_state(generator_state)
    return model


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that `train` wrote, or of any Hugging Face causal LM (folder or hub name)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        return model.eval(), AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise FastSAEError(not_loaded(str(folder), error)) from None


def not_loaded(name: str, error: Exception) -> str:
    """Why no causal LM came of a name, on one line: a folder without one, no folder, or not on the hub either."""
    reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    if Path(name).is_dir():
        return f"expected a Hugging Face causal LM in the folder {name!r}: {reason}"
    remedy = "give the folder of a causal LM, or its name on the Hugging Face hub"
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is None:
        return f"there is no folder {name!r}: {remedy}"
    tried = f"no causal LM of that name came from the hub or its cache ({reason})"
    return f"there is no folder {name!r}, and {tried}: {remedy}"


def _contexts(stream: Tensor, config: LMConfig, step: int, end_id: int) -> Tensor:
    """The batch of one step, [B, context + 1]: END, then a window of the stream. A function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(
        0, len(stream) - config.context, (config.batch_tokens // config.context,), generator=generator
    )
    windows = stream[starts[:, None] + torch.arange(config.context)]
    return torch.cat([torch.full((len(starts), 1), end_id), windows], dim=1)


def _learning_rate(config: LMConfig, step: int) -> float:
    warmup = max(1, int(0.03 * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: torch.nn.Module, config: LMConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def validation_loss(model: Any, stream: np.ndarray, context: int, end_id: int, max_tokens: int = 200_000) -> float:
    """Mean next-token cross-entropy in nats over windows [END, context tokens] of a stream, every token once."""
    device = next(model.parameters()).device
    count = min(len(stream), max_tokens) // context
    if count == 0:
        raise FastSAEError(f"validation needs at least one context of {context} tokens, got {len(stream)}")
    windows = torch.from_numpy(stream[: count * context].astype(np.int64)).view(count, context)
    windows = torch.cat([torch.full((count, 1), end_id), windows], dim=1)
    total = 0.0
    for batch in windows.split(32):
        batch = batch.to(device)
        logits = model(batch[:, :-1], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (count * context)


def train(
    train_documents: list[Document],
    heldout_documents: list[Document],
    config: LMConfig,
    out: str | Path,
    tokenizer: Any = None,
    resume: bool = False,
    on_step: Callable[[int, int, dict], None] | None = None,
    device: str = "auto",
    show_progress: bool = True,
) -> dict:
    """Trains tokenizer (unless given) and model into the folder `out`; returns and writes `lm.json`.

    `lm.json` has val_loss, unigram and bigram (nats per token on the same held-out tokens), tokens, seconds. Every
    `checkpoint_every` steps a checkpoint is written; with resume=True the run goes on from it, bit for bit on the CPU.
    on_step(step, steps, {"loss", "lr", "tokens_per_s"}) is called every 20 steps. device: "cpu", "cuda", …; "auto"
    takes the GPU if there is one. Raises FastSAEError for too little text, no such device, no space left, or when `out`
    holds a run with another configuration or on another text.
    """
    out = Path(out)
    known = None if tokenizer is None else documents_digest([json.dumps(tokenizer.get_vocab(), sort_keys=True)])
    text = documents_digest([*train_documents, *heldout_documents])
    claim_folder(out, "lm", {"lm": asdict(config), "text": text, "tokenizer": known}, resume)
    if resume and (out / RESULTS).exists():  # written last
        return json.loads((out / RESULTS).read_text(encoding="utf-8"))
    checkpoint = out / "checkpoint.pt"
    if tokenizer is None:
        tokenizer = train_tokenizer(train_documents, config.vocab_size)
    end_id = tokenizer.convert_tokens_to_ids(END)
    streams = [encode(tokenizer, documents) for documents in (train_documents, heldout_documents)]
    for name, stream in zip(("training", "held-out"), streams, strict=True):
        if len(stream) < 2 * config.context:
            raise FastSAEError(f"{name} text has {len(stream)} tokens, expected at least {2 * config.context}")
    stream = torch.from_numpy(streams[0].astype(np.int64))
    device = str(choose_device(device))
    model: Any = build_model(config, end_id)
    model.to(device)
    optimizer = _optimizer(model, config)
    first, seconds = 0, 0.0
    if resume and checkpoint.exists():
        state = read_torch(checkpoint, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    truncate_log(out / "log.jsonl", first)

    started = time.monotonic() - seconds
    done = first  # steps

    def save() -> None:
        write_torch(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "seconds": time.monotonic() - started,
            },
        )

    model.train()
    size = config.batch_tokens
    meter_of = progress("language model", config.steps * size, "tokens", first * size, show_progress)
    with open(out / "log.jsonl", "a", encoding="utf-8") as log, meter_of as meter:
        try:
            while done < config.steps:
                lr = _learning_rate(config, done)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = _contexts(stream, config, done, end_id).to(device)
                logits = model(batch[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                with uninterrupted():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    done += 1
                meter.advance(size)
                if done % 20 == 0 or done == config.steps:
                    rate = (done - first) * config.batch_tokens / (time.monotonic() - started - seconds)
                    row = {"step": done, "loss": loss.item(), "lr": lr, "tokens_per_s": rate}
                    if not math.isfinite(row["loss"]):
                        raise FastSAEError(f"the loss became {row['loss']} at step {done}; lower lr ({config.lr})")
                    log.write(json.dumps(row) + "\n")
                    meter.note = f"loss {row['loss']:.3f}"
                    if on_step:
                        on_step(done, config.steps, row)
                if done % config.checkpoint_every == 0 and done < config.steps:
                    save()
        except KeyboardInterrupt:
            save()
            raise
    save()  # what follows can fail, and is then done again
    model.eval()
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except Exception as error:  # safetensors and tokenizers have error classes of their own for a full disk
        if "No space left" not in str(error):
            raise
        raise FastSAEError(f"no space left for the model in {out}: free some space, then resume the run") from None
    heldout = streams[1]
    results = {
        "val_loss": validation_loss(model, heldout, config.context, end_id),
        **baselines.losses(streams[0], heldout[: 200_000 // config.context * config.context], config.vocab_size),
        "tokens": config.steps * (config.batch_tokens // config.context) * config.context,
        "unique_tokens": len(streams[0]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.monotonic() - started,
        "config": asdict(config),
    }
    write_json(out / RESULTS, results)
    checkpoint.unlink(missing_ok=True)
    return results
