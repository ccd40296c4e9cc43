"""The main job from end to end: two language models side by side, their dictionaries, and a report on the features.

Stages, each in a folder of its own under the output folder, each reused when it is finished:

    tokenizer ─┬─ lm-a ── store-a ── sae-a ── eval-a ── narrow, wide ─┬─ analysis → report.html, results.json, *.png
               └─ lm-b ── store-b ── sae-b ── eval-b ── control ──────┘

The two branches differ in the seed alone and run as two processes. narrow and wide: dictionaries of half and twice the
features on store-a, to see features split. control: a dictionary trained on lm-b with its weights shuffled. Features
are chosen on one half of the held-out documents and scored on the other half.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastsae
from fastsae import corpus, lm
from fastsae.analysis import AnalyzeConfig, analyze, shuffled
from fastsae.analysis.quality import quality
from fastsae.errors import FastSAEError
from fastsae.evaluate import EvalConfig
from fastsae.files import claim_folder, write_json
from fastsae.harvest import HarvestConfig
from fastsae.lm import LMConfig
from fastsae.recipe import TrainConfig

BRANCHES = {"a": 0, "b": 1}  # name → seed


@dataclass(frozen=True)
class Scale:
    """Sizes of one demo. The same for both branches but for the seed."""

    lm: LMConfig
    harvest: HarvestConfig
    train: TrainConfig
    evaluate: EvalConfig
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    every: int = 1  # of the built-in documents one in `every` is read


# The laptop's sizes come from trials with 14 language models: 384 neurons stay mixed (the best has r 0.33 with Arabic)
# and matter to the model, 512 TopK latents keep a script in one latent (r 0.84). The gpu scale has not been run.
SCALES: dict[str, Scale] = {
    "tiny": Scale(
        LMConfig(vocab_size=512, d_model=32, d_mlp=64, n_heads=2, context=64, tokens=200_000, batch_tokens=1024),
        HarvestConfig(tokens=60_000, tokens_per_context=32, context=64, dtype="bfloat16"),
        TrainConfig(activation="relu", d_sae=256, l1_coefficient=3.0, batch_size=512, lr=3e-3),
        EvalConfig(tokens=10_000, context=64),
        AnalyzeConfig(
            context=64, contexts_per_effect=24, sample_tokens=12, samples=2, control_tokens=20_000, explain_features=12,
            explain_up_to=30, effects_up_to=40,
        ),
        every=8,
    ),
    "laptop": Scale(
        LMConfig(),
        HarvestConfig(tokens=3_000_000, tokens_per_context=64, dtype="bfloat16"),
        TrainConfig(activation="topk", d_sae=512, k=12, batch_size=2048, lr=2e-3),
        EvalConfig(tokens=100_000),
    ),
    "gpu": Scale(
        LMConfig(d_mlp=512, tokens=200_000_000, batch_tokens=16_384),
        HarvestConfig(tokens=40_000_000, tokens_per_context=64, dtype="bfloat16", batch_size=256),
        TrainConfig(activation="topk", d_sae=4096, k=16, batch_size=8192, lr=5e-4),
        EvalConfig(tokens=200_000),
    ),
}


class _Stages:
    """Which stages are finished: one file each, with a fingerprint of all that went into the stage."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say = out, say

    def run(self, name: str, inputs: Any, work: Callable[[], dict]) -> dict:
        """work()'s result, or the one that a finished run with the same inputs left."""
        marker = self.out / "stages" / f"{name}.json"
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if marker.exists():
            there = json.loads(marker.read_text(encoding="utf-8"))
            if there["fingerprint"] == fingerprint:
                self.say(f"{name}: finished before ({there['seconds']:.0f} s), reused")
                return there["result"]
            raise FastSAEError(
                f"{self.out} holds a demo with other settings (stage {name}); choose another folder or remove it"
            )
        self.say(f"{name}: started")
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        write_json(marker, {"fingerprint": fingerprint, "seconds": seconds, "result": result})
        self.say(f"{name}: done in {seconds:.0f} s")
        return result


def _documents(scale: Scale, split: corpus.Split) -> list[corpus.Document]:
    return corpus.builtin(split)[:: scale.every]


def demo(out: Path, scale_name: str = "laptop") -> dict:
    """Runs all stages into `out` and returns what results.json holds.

    Raises FastSAEError for an unknown scale or a folder that holds something else. Ctrl-C stops both branches with a
    checkpoint; the same call goes on from there.
    """
    if scale_name not in SCALES:
        raise FastSAEError(f"scale must be one of {', '.join(SCALES)}, got {scale_name!r}")
    scale = SCALES[scale_name]
    out = Path(out)
    claim_folder(out, "demo", {"scale": scale_name}, resume=True)
    started = time.monotonic()
    stages = _Stages(out, _say)

    def tokenizer() -> dict:
        lm.train_tokenizer(_documents(scale, "train"), scale.lm.vocab_size).save_pretrained(out / "tokenizer")
        return {"vocab_size": scale.lm.vocab_size}

    stages.run("tokenizer", [scale.lm.vocab_size, scale.every], tokenizer)
    _run_branches(out, scale_name)
    branches = {name: branch(out, scale_name, name, say=lambda _: None) for name in BRANCHES}

    def analysis() -> dict:
        (model_a, tokenizer), (model_b, _) = (lm.load(out / f"lm-{name}") for name in BRANCHES)
        names = ("sae-a", "sae-b", "control", "narrow", "wide")
        sae_a, sae_b, sae_control, *widths = (fastsae.SAE.from_pretrained(out / name / "sae") for name in names)
        heldout = _documents(scale, "heldout")
        figures = {"scale": scale_name, **branches}
        return analyze(
            sae_a, model_a, tokenizer, heldout, lm.MLP_HOOK, out, scale.analyze, other=(sae_b, model_b),
            control=(sae_control, shuffled(model_b)), widths=widths, quality=figures,
        )  # fmt: skip

    _quiet_transformers()
    result = stages.run("analysis", [asdict(scale), branches], analysis)
    _say(f"site: {out / 'index.html'} · report: {out / 'report.html'} (this run: {time.monotonic() - started:.0f} s)")
    return result


def branch(out: Path, scale_name: str, name: str, say: Callable[[str], None]) -> dict:
    """All stages of one branch, "a" or "b": {"lm": …, "train": …, "eval": …}."""
    scale, seed = SCALES[scale_name], BRANCHES[name]
    stages = _Stages(out, say)
    lm_config = LMConfig(**{**asdict(scale.lm), "seed": seed})
    folder, store, sae = (out / f"{part}-{name}" for part in ("lm", "store", "sae"))

    def train_lm() -> dict:
        tokenizer = _load_tokenizer(out / "tokenizer")
        train, heldout = _documents(scale, "train"), _documents(scale, "heldout")
        return lm.train(train, heldout, lm_config, folder, tokenizer, resume=True)

    def harvest() -> dict:
        model, tokenizer = lm.load(folder)
        config = HarvestConfig(**{**asdict(scale.harvest), "seed": seed})
        documents = _documents(scale, "train")
        kept = fastsae.harvest(model, tokenizer, documents, lm.MLP_HOOK, store, config, resume=True)
        return {"count": kept.count, "width": kept.width, "mean_norm": kept.mean_norm}

    def train_sae() -> dict:
        config = TrainConfig(**{**asdict(scale.train), "seed": seed})
        fastsae.train(fastsae.ActivationStore(store), config, sae, resume=True)
        return json.loads((sae / "train.json").read_text(encoding="utf-8"))

    def evaluate() -> dict:
        model, tokenizer = lm.load(folder)
        dictionary = fastsae.SAE.from_pretrained(sae / "sae")
        heldout = _documents(scale, "heldout")
        result = fastsae.evaluate(dictionary, model, tokenizer, heldout, lm.MLP_HOOK, scale.evaluate)
        return quality(dictionary, result).to_dict()

    inputs: list[Any] = [asdict(lm_config), scale.every]
    results = {"lm": stages.run(f"lm-{name}", inputs, train_lm)}
    inputs += [asdict(scale.harvest)]
    stages.run(f"store-{name}", inputs, harvest)
    inputs += [asdict(scale.train)]
    results["train"] = stages.run(f"sae-{name}", inputs, train_sae)
    inputs += [asdict(scale.evaluate)]
    results["eval"] = stages.run(f"eval-{name}", inputs, evaluate)
    if name == "a":
        for part, d_sae in (("narrow", scale.train.d_sae // 2), ("wide", scale.train.d_sae * 2)):
            stages.run(part, inputs, partial(_width, store, out / part, scale, d_sae))
    else:
        stages.run("control", inputs, partial(_control, folder, out / "control", scale))
    return results


def _width(store: Path, folder: Path, scale: Scale, d_sae: int) -> dict:
    """A dictionary of another width on the same activations."""
    fastsae.train(fastsae.ActivationStore(store), replace(scale.train, d_sae=d_sae), folder, resume=True)
    return {"d_sae": d_sae}


def _control(model_folder: Path, folder: Path, scale: Scale) -> dict:
    """A dictionary of a model that has learnt nothing but how large its weights are; its activations are not kept."""
    model, tokenizer = lm.load(model_folder)
    config = replace(scale.harvest, tokens=scale.harvest.tokens and scale.harvest.tokens // 3)
    documents, store = _documents(scale, "train"), folder.with_name("store-control")
    kept = fastsae.harvest(shuffled(model), tokenizer, documents, lm.MLP_HOOK, store, config, resume=True)
    fastsae.train(kept, scale.train, folder, resume=True)
    shutil.rmtree(store)
    return {"count": kept.count}


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _run_branches(out: Path, scale_name: str) -> None:
    """Both branches at the same time, each in a process with half of the cores; on a GPU one after the other."""
    threads = max(
        1, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 2) // 2
    )
    groups = [[name] for name in BRANCHES] if torch.cuda.is_available() else [list(BRANCHES)]
    for group in groups:
        children = {name: _start(out, scale_name, name, threads) for name in group}
        readers = [threading.Thread(target=_relay, args=(child, name), daemon=True) for name, child in children.items()]
        for reader in readers:
            reader.start()
        try:
            for child in children.values():
                child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the children too, which write their checkpoints
            for child in children.values():
                child.wait()
            raise
        for reader in readers:
            reader.join()
        failed = [name for name, child in children.items() if child.returncode]
        if failed:
            raise FastSAEError(f"branch {' and '.join(failed)} of the demo failed; its last lines above say why")


def _start(out: Path, scale_name: str, name: str, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastsae.demo", str(out), scale_name, name, str(threads)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")


def _relay(child: subprocess.Popen, name: str) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if line.strip():
            _say(f"[{name}] {line.rstrip()}")


def _child(out: str, scale_name: str, name: str, threads: str) -> int:
    torch.set_num_threads(int(threads))
    _quiet_transformers()
    try:
        branch(Path(out), scale_name, name, _say)
    except FastSAEError as error:
        _say(str(error))
        return 2
    except OSError as error:  # a full disk, most likely
        _say(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
