"""The verbs that ask questions of dictionaries: `fastsae match`, `split`, `steer`, `explain`, `serve`."""

from dataclasses import asdict
from pathlib import Path

from fastsae.analysis.explain import ExplainConfig
from fastsae.analysis.matches import MatchConfig
from fastsae.analysis.splitting import SplitConfig
from fastsae.analysis.steering import SteerConfig, Steering
from fastsae.analysis.stream import check_features
from fastsae.errors import FastSAEError
from fastsae.files import claim_folder
from fastsae.inputs import load_beside, load_model, load_sae
from fastsae.lm import MLP_HOOK

try:
    from tyro.conf import OmitArgPrefixes as OnOneLevel
except ImportError:
    raise SystemExit("fastsae: the command line needs tyro and rich: pip install 'fastsae[all]'") from None


def match(
    sae: Path,
    model: str,
    other_sae: Path,
    out: Path,
    config: OnOneLevel[MatchConfig],
    hook: str = MLP_HOOK,
    other_model: str | None = None,
    other_hook: str | None = None,
    control_sae: Path | None = None,
    control_model: str | None = None,
    text: str = "builtin",
    text_field: str = "text",
) -> dict:
    """Look for every feature of a dictionary in another run: other seed, width, layer or model with its tokenizer.

    Stopped, the same command goes on from the last minute, or from where Ctrl-C came.

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        other_sae: Folder of the dictionary to look in.
        out: New folder, or one that this same command made; match.json holds every feature's figures.
        hook: Module path that the dictionary was trained on.
        other_model: The causal LM of the other dictionary; left out, the same one.
        other_hook: Module path of the other dictionary; left out, the same one.
        control_sae: Folder of a dictionary trained on a shuffled model, as a control; left out, the other dictionary
            reads a shuffled copy of its model (see --shuffled-control).
        control_model: The shuffled model of that dictionary, with the same tokenizer; it reads the other's hook.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    from fastsae import corpus
    from fastsae.analysis import universality
    from fastsae.analysis.stream import Source

    given = {"sae": sae, "model": model, "hook": hook, "text": text, "other_sae": other_sae}
    given |= {"other_model": other_model, "other_hook": other_hook}
    if (control_sae is None) != (control_model is None):
        raise FastSAEError("control_sae and control_model go together, got one of them")
    if control_sae is not None:
        given |= {"control_sae": control_sae, "control_model": control_model}
    claim_folder(out, "match", {**given, "match": asdict(config)}, resume=True)
    network, tokenizer = load_model(model)
    other = network if other_model in (None, model) else load_beside(other_model, tokenizer, model)
    control = None
    if control_sae is not None and control_model is not None:
        control = Source(load_sae(control_sae), load_beside(control_model, tokenizer, model), other_hook or hook)
    documents = corpus.load(text, "heldout", text_field)
    there = (other_model or model, other_hook or hook)
    sources = Source(load_sae(sae, model, hook), network, hook), Source(load_sae(other_sae, *there), other, there[1])
    found = universality.match(*sources, tokenizer, documents, config, control=control, out=out, resume=True)
    medians = {f"median {name}": value for name, value in found.medians().items()}
    return {
        "tokens": found.tokens, "live": int(found.live.sum()), **medians, "control": found.control_kind,
        "match": str(out / "match.json"),
    }  # fmt: skip


def split(
    saes: tuple[Path, ...],
    model: str,
    out: Path,
    config: OnOneLevel[SplitConfig],
    hook: str = MLP_HOOK,
    categories: tuple[str, ...] = (),
    text: str = "builtin",
    text_field: str = "text",
) -> dict:
    """Join the features of dictionaries of growing width on one module, and draw a map of them.

    Stopped, the same command goes on from the last minute, or from where Ctrl-C came.

    Args:
        saes: Folders of the dictionaries, from the narrowest to the widest.
        model: Folder or hub name of the causal LM they were trained on.
        out: New folder, or one that this same command made: split.json, map.json and map.png.
        hook: Module path they were trained on.
        categories: Categories of text, as of analyze; the map is then also coloured by the one that each feature
            follows best (map-categories.png), which takes a second pass over the text.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    from fastsae import corpus
    from fastsae.analysis import splitting
    from fastsae.analysis.follows import follows
    from fastsae.analysis.proxies import proxies
    from fastsae.analysis.reading import pass_file
    from fastsae.analysis.stream import Source

    proxies(categories)  # a name that means nothing is told before the hours of text
    given = {"saes": [str(sae) for sae in saes], "model": model, "hook": hook, "text": text}
    given |= {"categories": categories} if categories else {}
    claim_folder(out, "split", {**given, "split": asdict(config)}, resume=True)
    network, tokenizer = load_model(model)
    documents = corpus.load(text, "heldout", text_field)
    dictionaries = [load_sae(sae, model, hook) for sae in saes]
    sources = [Source(sae, network, hook) for sae in dictionaries]
    found = splitting.read_split(sources, tokenizer, documents, config, out=out, resume=True).result()
    found.save(out / "split.json")
    followed = None
    if categories:
        followed = follows(
            sources, tokenizer, documents, categories, context=config.context, batch_size=config.batch_size,
            max_tokens=config.tokens,
        )  # fmt: skip
    splitting.draw_map(found, [sae.W_dec for sae in dictionaries], out, follows=followed)
    pass_file(out, "split").unlink(missing_ok=True)  # not before the map, which may fail for want of a package
    steps = {f"children, {a} to {b}": row["mean_children"] for a, b, row in found.steps()}
    return {"tokens": found.tokens, **steps, "split": str(out / "split.json"), "map": str(out / "map.png")}


def steer(
    sae: Path,
    model: str,
    config: OnOneLevel[SteerConfig],
    hook: str = MLP_HOOK,
    text: str = "builtin",
    text_field: str = "text",
) -> Steering:
    """Let a model write with features pinned, raised or ablated, beside what it writes without.

        fastsae steer --sae runs/sae --model gpt2 --features 1234 --multiple 2 --prompts "My friend said"

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        hook: Module path it was trained on.
        text: Where the features' maxima are measured, unless --value is given: builtin, a text file, a .jsonl file, a
            folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    from fastsae import corpus
    from fastsae.analysis import steering

    dictionary = load_sae(sae, model, hook)
    network, tokenizer = load_model(model)
    measured: dict[int, float] = {}
    if config.needs_maxima:
        longest = getattr(network.config, "max_position_embeddings", None) or config.context
        documents = corpus.load(text, "heldout", text_field)
        measured = steering.maxima(
            dictionary, network, tokenizer, documents, hook, config.features,
            tokens=config.measure_tokens, context=min(config.context, longest), batch_size=config.batch_size,
        )  # fmt: skip
    edits = config.edits(measured)
    options = {name: getattr(config, name) for name in ("tokens", "samples", "temperature", "seed")}
    found = steering.steer(dictionary, network, tokenizer, config.prompts, hook, edits, **options)
    return Steering(edits, found, measured)


def explain(
    sae: Path,
    model: str,
    out: Path,
    config: OnOneLevel[ExplainConfig],
    hook: str = MLP_HOOK,
    features: tuple[int, ...] = (),
    count: int = 50,
    tokens: int | None = 500_000,
    context: int = 128,
    controls: bool = False,
    control_sae: Path | None = None,
    control_model: str | None = None,
    text: str = "builtin",
    text_field: str = "text",
) -> dict:
    r"""Explain features from examples, without a language model or with one, and score that on held-out text.

        fastsae explain --sae sae --model lm --out explained --features 3 14
        fastsae explain --sae sae --model lm --out explained \
            --explainer endpoint --endpoint http://localhost:8000/v1 --explainer-model NAME

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        out: Folder for explain.json, the log, models' answers and what they cost; the same command goes on there.
        hook: Module path it was trained on.
        features: Numbers of the features; left out, some that fire often enough are drawn.
        count: How many are drawn.
        tokens: Held-out tokens to read.
        context: Tokens in a context, the begin-of-text token included.
        controls: Explain as many neurons, random directions and misplaced features as well, in the same way. A score
            is worth what it is above theirs.
        control_sae: Dictionary of a model that has learnt nothing, for one more control.
        control_model: That model: one with the weights of every matrix shuffled (fastsae.analysis.shuffled).
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    from fastsae import corpus
    from fastsae.analysis.evidence import explain_dictionary
    from fastsae.analysis.stream import Source
    from fastsae.analysis.survey import SurveyConfig

    if (control_sae is None) != (control_model is None):
        raise FastSAEError("control_sae and control_model go together, got one of them")
    dictionary = load_sae(sae, model, hook)
    check_features(features, dictionary.cfg.d_sae)
    given = {"sae": sae, "model": model, "hook": hook, "text": text, "tokens": tokens, "context": context}
    claim_folder(out, "explain", given, resume=True)
    network, tokenizer = load_model(model)
    control = None
    if control_sae is not None and control_model is not None:
        control = Source(load_sae(control_sae), load_beside(control_model, tokenizer, model), hook)
    documents = corpus.load(text, "heldout", text_field)
    found = explain_dictionary(
        Source(dictionary, network, hook), tokenizer, documents, features, config,
        SurveyConfig(categories=(), tokens=tokens, context=context, seed=config.seed), count=count,
        controls=controls, control=control, out=out,
    )  # fmt: skip
    results = found["results"]["features"]
    said = {f"feature {r.feature}": f"{r.explanation or r.failed}  ({_score(r.spearman)})" for r in results}
    summary = {name: {k: asdict(s) for k, s in row.items()} for name, row in found["summary"].items()}
    if len(summary) == 1:
        means = {f"mean {name}": s["mean"] for name, s in summary["features"].items() if s["mean"] is not None}
    else:
        means = {f"{k}, {name}": _mean(row[k]) for k in summary["features"] for name, row in summary.items()}
    every = [result for group in found["results"].values() for result in group]
    failed = sum(r.failed is not None for r in every)
    spent: dict = {}
    if config.explainer != "offline":
        names = {"requests": "requests", "prompt_tokens": "tokens asked", "completion_tokens": "tokens answered"}
        names |= {"cost": "cost"} if config.prompt_price or config.completion_price else {}
        for name, title in names.items():
            spent |= {title: getattr(found["session"], name), f"{title}, all runs": getattr(found["accounting"], name)}
    done = {"explained": len(every), "failed": failed, **spent, "results": str(out / "explain.json")}
    return {**said, **means, **done, "summary": summary}


def _mean(summary: dict) -> str:
    if summary["mean"] is None:
        return f"not scored, {summary['failed']} failed"
    low, high = summary["mean_interval"]
    return f"{summary['mean']:.2f}  (95 %: {low:.2f} to {high:.2f}, n = {summary['n']}, {summary['failed']} failed)"


def _score(value: float | None) -> str:
    return "not scored" if value is None else f"score {value:.2f}"
