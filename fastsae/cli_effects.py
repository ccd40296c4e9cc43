"""The verbs that ask what features do to a model's next tokens: `fastsae automata`, `attribute`."""

from dataclasses import asdict
from pathlib import Path

from fastsae.analysis.automata import AutomataConfig, Edge
from fastsae.analysis.contributions import AttributeConfig, Contributions
from fastsae.analysis.stream import check_features
from fastsae.errors import FastSAEError
from fastsae.files import claim_folder, write_json
from fastsae.inputs import load_model, load_sae
from fastsae.lm import MLP_HOOK

try:
    from tyro.conf import OmitArgPrefixes as OnOneLevel
except ImportError:
    raise SystemExit("fastsae: the command line needs tyro and rich: pip install 'fastsae[all]'") from None


def automata(
    sae: Path,
    model: str,
    out: Path,
    config: OnOneLevel[AutomataConfig],
    hook: str = MLP_HOOK,
    features: tuple[int, ...] = (),
    start: tuple[int, ...] = (),
    length: int = 4,
    text: str = "builtin",
    text_field: str = "text",
) -> dict:
    """Chains of features: what one makes likely next, and which feature fires on that.

    Transitions are chosen on one half of the documents; held out, they are measured on the other.

        fastsae automata --sae runs/sae --model lm --out automata --start 12

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        out: New folder, or one that this same command made; automata.json holds states, transitions and cycles.
        hook: Module path it was trained on.
        features: The features to take for states; left out, all that fire often enough.
        start: Features whose chains are told; left out, those of the strongest transitions.
        length: Transitions in a chain at most.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    from fastsae import corpus
    from fastsae.analysis import automata as module
    from fastsae.analysis.labels import TokenBytes, readable
    from fastsae.analysis.stream import Source
    from fastsae.visible import visible

    if length < 1:
        raise FastSAEError(f"length must be at least 1 transition, got {length}")
    dictionary = load_sae(sae, model, hook)
    check_features([*features, *start], dictionary.cfg.d_sae)
    given = {"sae": sae, "model": model, "hook": hook, "text": text, "features": features}
    claim_folder(out, "automata", {**given, "automata": asdict(config)}, resume=True)
    network, tokenizer = load_model(model)
    documents = corpus.load(text, "heldout", text_field)
    source = Source(dictionary, network, hook)
    found = module.automata(source, tokenizer, documents, config, features=features or None)
    bytes_of = TokenBytes.of(tokenizer)

    def spelled(token: int) -> str:
        return readable([bytes_of[token]])[0]

    def told(chain: list[Edge]) -> str:
        way = "".join(f" –{visible(spelled(e.token))!r}→ {e.target}" for e in chain)
        known = ("unknown" if e.excess_held_out is None else f"{e.excess_held_out:.2f}" for e in chain)
        return f"{chain[0].source}{way}  (excess, held out: {', '.join(known)})"

    found.save(out / "automata.json", spelled)
    strongest = list(dict.fromkeys(edge.source for edge in found.edges))[:10]
    chains = {f: found.chains(f, length, count=1) for f in start or strongest}
    said = {f"chain from {f}": told(paths[0]) if paths else "none" for f, paths in chains.items()}
    titles = {"median excess": "excess", "median excess, held out": "excess_held_out", "share kept, held out": "kept"}
    scored = found.held_out()
    worth = {title: scored.get(key, "unknown") for title, key in titles.items() if found.edges}
    return {
        "tokens": found.tokens, "states": len(found.features), "transitions": len(found.edges), **worth,
        "cycles": len(found.cycles(length)), **said, "automata": str(out / "automata.json"),
    }  # fmt: skip


def attribute(
    sae: Path,
    model: str,
    config: OnOneLevel[AttributeConfig],
    hook: str = MLP_HOOK,
    text: str = "builtin",
    text_field: str = "text",
    out: Path | None = None,
) -> Contributions:
    """What features contribute to the next tokens of a text, by gradient × activation, with ablation beside it.

        fastsae attribute --sae runs/sae --model lm --prompts "My friend said that"

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        hook: Module path it was trained on.
        text: Where contexts are drawn unless --prompts are given: builtin, a text file, a .jsonl file, a folder of
            those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
        out: New folder, or one that this same command made, for attribute.json: the table and every place compared.
    """
    from fastsae import corpus
    from fastsae.analysis.contributions import contributions

    if out is not None:
        given = {"sae": sae, "model": model, "hook": hook, "text": text}
        claim_folder(out, "attribute", {**given, "attribute": asdict(config)}, resume=True)
    dictionary = load_sae(sae, model, hook)
    network, tokenizer = load_model(model)
    documents = () if config.prompts else corpus.load(text, "heldout", text_field)
    found = contributions(dictionary, network, tokenizer, hook, documents, config)
    if out is not None:
        write_json(out / "attribute.json", found.to_dict())
    return found
