"""The verbs that make a report and show it: `fastsae analyze`, `fastsae serve`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastsae.analysis import AnalyzeConfig
from fastsae.errors import FastSAEError
from fastsae.files import claim_folder, seen_from
from fastsae.inputs import load_beside, load_model, load_sae, load_tokenizer
from fastsae.lm import MLP_HOOK

try:
    import tyro
    from tyro.conf import OmitArgPrefixes as OnOneLevel
    from tyro.conf import Positional
except ImportError:
    raise SystemExit("fastsae: the command line needs tyro and rich: pip install 'fastsae[all]'") from None


def analyze(
    sae: Path,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    config: OnOneLevel[AnalyzeConfig],
    model: str | None = None,
    store: Path | None = None,
    hook: str = MLP_HOOK,
    text: str = "builtin",
    text_field: str = "text",
    other_sae: Path | None = None,
    other_model: str | None = None,
    control_sae: Path | None = None,
    control_model: str | None = None,
    widths: tuple[Path, ...] = (),
) -> dict:
    """Find the features of scripts, base64 and DNA on held-out text and write a report on them.

    Stopped, the same command goes on from the last minute, or from where Ctrl-C came.

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        out: New folder, or one that this same command made: index.html (a page for every feature), report.html (the
            categories), results.json and the figures.
        model: Folder or hub name of the causal LM it was trained on.
        store: Activations that fastsae harvest kept, to read in place of the model: a page for every feature, without
            what needs a model. --model then gives logit weights as well; --text must be what was harvested.
        hook: Module path it was trained on; a store knows its own.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
        other_sae: Dictionary of another run, to look for the same features in.
        other_model: The causal LM of that other run; same tokenizer.
        control_sae: Dictionary trained on a shuffled model, as a control beside the others.
        control_model: That model: one with the weights of every matrix shuffled (fastsae.analysis.shuffled).
        widths: Narrower and wider dictionaries of the same model and module, to see features split.
    """
    from fastsae import corpus
    from fastsae.analysis import analyze as run

    if store is not None:
        if refused := [n for n, v in (("other_sae", other_sae), ("control_sae", control_sae), ("widths", widths)) if v]:
            raise FastSAEError(f"{refused[0]} needs the model to be run: leave it out, or --store")
        return _of_store(sae, store, out, config, model, text, text_field)
    if model is None:
        raise FastSAEError("analyze needs the model that the dictionary was trained on: give --model, or --store")
    for name, one, both in (("other", other_sae, other_model), ("control", control_sae, control_model)):
        if (one is None) != (both is None):
            raise FastSAEError(f"{name}_sae and {name}_model go together, got one of them")
    paths = {"sae": sae, "model": model, "text": text, "other_sae": other_sae, "other_model": other_model}
    paths |= {"control_sae": control_sae, "control_model": control_model}
    given: dict[str, Any] = {name: seen_from(out, path) for name, path in paths.items() if path is not None}
    given |= {"hook": hook, "text_field": text_field, "widths": [seen_from(out, width) for width in widths]}
    claim_folder(out, "analysis", {**given, "analyze": asdict(config)}, resume=True)
    network, tokenizer = load_model(model)
    other, control = (
        None if folder is None or name is None else (load_sae(folder, name, hook), load_beside(name, tokenizer, model))
        for folder, name in ((other_sae, other_model), (control_sae, control_model))
    )
    documents = corpus.load(text, "heldout", text_field)
    found = run(
        load_sae(sae, model, hook), network, tokenizer, documents, hook, out, config, other=other, control=control,
        widths=[load_sae(width) for width in widths],
    )  # fmt: skip
    without = {f"without {note['name']}": note["reason"] for note in found["notes"]}
    pages = {"site": str(out / "index.html"), "report": str(out / "report.html")}
    return {**found, **_rare(found), **without, **pages}

def _rare(found: dict) -> dict:
    return {
        f"left out: {row['name']}": "{} and {} of the tokens in the two halves: too rare".format(*row["tokens"])
        for row in found["left_out"]
    }


def _of_store(
    sae: Path, folder: Path, out: Path, config: AnalyzeConfig, model: str | None, text: str, text_field: str
) -> dict:
    import fastsae
    from fastsae import corpus
    from fastsae.analysis import analyze_store

    store = fastsae.ActivationStore(folder)
    name, hook = model or store.meta.get("model"), store.meta.get("hook")
    if not name or not hook:
        raise FastSAEError(f"{folder} does not say what it was harvested from: use analyze_store from Python")
    paths = {"sae": sae, "store": folder, "model": name, "text": text}
    given: dict[str, Any] = {key: seen_from(out, path) for key, path in paths.items()}
    given |= {"hook": hook, "text_field": text_field, "logits": model is not None}
    claim_folder(out, "analysis", {**given, "analyze": asdict(config)}, resume=True)
    network, tokenizer = (None, load_tokenizer(name)) if model is None else load_model(name)
    documents = corpus.load(text, "train", text_field)
    found = analyze_store(load_sae(sae, name, hook), store, tokenizer, documents, out, config, model=network)
    return {**found, **_rare(found), "site": str(out / "index.html")}


def serve(
    report: Annotated[Path, Positional],
    sae: Path | None = None,
    model: str | None = None,
    hook: str | None = None,
    text: str | None = None,
    text_field: str | None = None,
    other_sae: Path | None = None,
    other_model: str | None = None,
    other_hook: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8300,
    allow_host: tuple[str, ...] = (),
) -> dict:
    """Show a report in the browser, with live questions to the model: what fires on a text, what an edit changes.

        fastsae serve out/report

    Model, dictionary and text are those that the report was made of, where they are still in their places; the options
    name others. Without a model the report is shown and the live parts are off. The API is described at
    /api/openapi.json. Ctrl-C ends it.

    Args:
        report: Folder that fastsae analyze or fastsae demo wrote.
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        hook: Module path it was trained on.
        text: What new proxies are scored on: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its
            held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
        other_sae: Dictionary to compare with.
        other_model: The causal LM of that dictionary, with the same tokenizer; left out, the same one.
        other_hook: Module path of that dictionary; left out, the same one.
        host: Address to listen on. Whoever can reach it can read the report and use the model.
        port: Port to listen on; 0 takes a free one.
        allow_host: Names, besides this machine's own, under which browsers may call the server: of a proxy before it.
    """
    from fastsae.dashboard import run
    from fastsae.dashboard.stored import Stored

    with run.listening(host, port) as socket:
        stored = Stored(report)
        inputs = run.Inputs.of_report(report).but(
            sae=sae, model=model, hook=hook, text=text, text_field=text_field, other_sae=other_sae,
            other_model=other_model, other_hook=other_hook,
        )  # fmt: skip
        live, note = run.open_live(stored, inputs)
        if note is not None:
            _say(note if live is None else f"warning: {note}")
        if not run.is_loopback(host):
            _say(f"warning: whoever can reach {host} can read this report and use the model: there is no password")
        address = run.address(socket)
        _say(f"{address} (Ctrl-C to end)")
        run.serve(stored, live, note, host, socket, allow_host)
    return {"served": address}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
