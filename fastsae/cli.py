"""The command line: `fastsae VERB`. Options are the fields of the config dataclasses, under the same names."""

import contextlib
import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from fastsae.analysis.contributions import Contributions
from fastsae.analysis.steering import Steering
from fastsae.cli_analysis import explain, match, split, steer
from fastsae.cli_effects import attribute, automata
from fastsae.cli_errors import again, one_line
from fastsae.cli_report import analyze, serve
from fastsae.errors import FastSAEError
from fastsae.estimate import Estimate
from fastsae.evaluate import EvalConfig
from fastsae.harvest import HarvestConfig
from fastsae.inputs import load_model, load_sae, quiet
from fastsae.lm import MLP_HOOK, LMConfig
from fastsae.machines import GPUS
from fastsae.recipe import Preset, TrainConfig
from fastsae.visible import visible

try:
    import tyro
except ImportError:  # the library works without; the command line says what is missing
    raise SystemExit("fastsae: the command line needs tyro and rich: pip install 'fastsae[all]'") from None

OnOneLevel = tyro.conf.OmitArgPrefixes
_GPU_HELP = (
    f"The GPU to reckon with: {', '.join(GPUS)}. Left out, it is the machine at hand: its GPU, or its CPU, whose speed "
    "is measured for a second."
)
DESCRIPTION = """Sparse autoencoders: harvest activations, train dictionaries, read the features.

Every verb takes --help, and --json for output that a script can read. Start with: fastsae demo --out demo"""


def demo(
    out: Path,
    scale: Annotated[str, tyro.conf.arg(metavar="{tiny,laptop,gpu}")] = "laptop",
) -> dict:
    """The whole method on built-in text: two language models, their dictionaries, and a report on the features found.

    Args:
        out: Folder for everything; report.html, results.json and the figures stand at its top. A second run reuses
            the stages that are finished.
        scale: tiny (under 3 minutes, to see that it runs), laptop (under 30 minutes on 2 cores), gpu.
    """
    from fastsae.demo import demo as run

    return run(out, scale)


def lm(
    out: Path,
    config: OnOneLevel[LMConfig],
    text: str = "builtin",
    text_field: str = "text",
    device: str = "auto",
    resume: bool = False,
) -> dict:
    """Train a tokenizer and a one-layer transformer; saved so that AutoModelForCausalLM loads it.

    Args:
        out: New folder for the model.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME for a Hugging Face dataset.
        text_field: Field of a JSONL line or dataset row that holds the text.
        device: cpu, cuda, …; auto takes the GPU if there is one.
        resume: Go on with an interrupted run in the folder.
    """
    from fastsae import corpus
    from fastsae import lm as module

    quiet()
    documents = corpus.load(text, text_field=text_field)
    return module.train(
        corpus.split_of(documents, "train"),
        corpus.split_of(documents, "heldout"),
        config,
        out,
        resume=resume,
        device=device,
    )


def harvest(
    model: str,
    out: Path,
    config: OnOneLevel[HarvestConfig],
    hook: str = MLP_HOOK,
    text: str = "builtin",
    text_field: str = "text",
    resume: bool = False,
) -> dict:
    """Run a causal LM over text and store the activations of one of its modules.

    Args:
        model: Folder or hub name of a Hugging Face causal LM.
        out: New folder for the store.
        hook: Module path, as in model.get_submodule: transformer.h.0.mlp.act, model.layers.3, …
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME. Its held-out documents are left out.
        text_field: Field of a JSONL line or dataset row that holds the text.
        resume: Go on with an interrupted run in the folder.
    """
    import fastsae
    from fastsae import corpus

    network, tokenizer = load_model(model)
    documents = corpus.load(text, "train", text_field)
    store = fastsae.harvest(network, tokenizer, documents, hook, out, config, resume=resume)
    return {"store": str(out), "count": store.count, "width": store.width, "mean_norm": store.mean_norm}


def train(
    store: Path,
    out: Path,
    config: OnOneLevel[TrainConfig],
    preset: Preset | None = None,
    resume: bool = False,
) -> dict:
    """Train a dictionary on a store.

    Args:
        store: Folder that `fastsae harvest` wrote.
        out: New folder for the dictionary, its log and checkpoints.
        preset: A published recipe to start from; other options are set on top of it.
        resume: Go on with an interrupted run in the folder.
    """
    import fastsae

    fastsae.train(fastsae.ActivationStore(store), config, out, resume=resume)
    return {**json.loads((out / "train.json").read_text(encoding="utf-8")), "sae": str(out / "sae")}


def evaluate(
    sae: Path,
    model: str,
    config: OnOneLevel[EvalConfig],
    hook: str = MLP_HOOK,
    text: str = "builtin",
    text_field: str = "text",
) -> dict:
    """Measure a dictionary on held-out text: FVE, L0, dead and ultra-low latents, CE recovered, KL, geometry.

    Args:
        sae: Folder of the dictionary (the run's folder or its sae/ folder).
        model: Folder or hub name of the causal LM it was trained on.
        hook: Module path it was trained on.
        text: builtin, a text file, a .jsonl file, a folder of those, or hf:NAME; its held-out documents are used.
        text_field: Field of a JSONL line or dataset row that holds the text.
    """
    import fastsae
    from fastsae import corpus
    from fastsae.analysis.quality import quality

    network, tokenizer = load_model(model)
    documents = corpus.load(text, "heldout", text_field)
    dictionary = load_sae(sae, model, hook)
    found = fastsae.evaluate(dictionary, network, tokenizer, documents, hook, config)
    return quality(dictionary, found).to_dict()


def estimate(
    config: OnOneLevel[TrainConfig],
    gpu: Annotated[str | None, tyro.conf.arg(help=_GPU_HELP, metavar="NAME")] = None,
    preset: Preset | None = None,
) -> Estimate:
    """Memory, time per step and days of a training run, and what to switch on if it does not fit; trains nothing.

    No GPU is needed to ask about one: give its name, the width of the activations (--d-in), the number of latents
    (--d-sae), and any option that you would give to fastsae train. With --tokens it also tells the days.

        fastsae estimate --gpu h200 --d-in 4096 --d-sae 1048576 --tokens 1000000000

    Args:
        preset: A published recipe to start from; other options are set on top of it.
    """
    import fastsae

    return fastsae.estimate(config, gpu=gpu)


VERBS: dict[str, Callable[..., dict | Contributions | Estimate | Steering]] = {
    "demo": demo,
    "lm": lm,
    "harvest": harvest,
    "train": train,
    "eval": evaluate,
    "analyze": analyze,
    "steer": steer,
    "match": match,
    "split": split,
    "automata": automata,
    "attribute": attribute,
    "serve": serve,
    "explain": explain,
    "estimate": estimate,
}


def _with_preset(verb: Callable[..., Any], argv: Sequence[str]) -> Callable[..., Any]:
    """`train` or `estimate` with the preset's values as the defaults of its options, so that options on the line go on
    top."""
    words = [part for word in argv for part in word.split("=", 1)]

    def given(*options: str) -> str | None:
        return next((words[words.index(option) + 1] for option in options if option in words[:-1]), None)

    preset, store, d_in = given("--preset"), given("--store"), given("--d-in", "--d_in")
    if preset not in get_args(Preset):
        return verb
    if store is not None:
        import fastsae

        width = fastsae.ActivationStore(store).width
    elif verb is estimate:
        width = int(d_in) if d_in is not None and d_in.isdecimal() else 0
    else:
        return verb
    config = TrainConfig.preset(preset, d_in=width)  # type: ignore[arg-type]
    return functools.partial(verb, config=config)


def _later(verb: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """verb with the same signature and help, which when called only notes its arguments."""

    @functools.wraps(verb)
    def bound(*args: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(verb, *args, **options)

    bound.__doc__ = getattr(verb, "func", verb).__doc__  # of what a partial is made of
    return bound


def _parsed(verbs: dict[str, Any], argv: Sequence[str]) -> Callable[[], Any]:
    """The verb with its arguments, to be called.

    Raises FastSAEError for a command that cannot be meant, of which tyro itself would make a box of several lines.
    """
    later = {name: _later(verb) for name, verb in verbs.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                later, prog="fastsae", description=DESCRIPTION, args=argv or ["--help"]
            )
    except SystemExit as stopped:
        cause: BaseException | None = stopped
        while cause is not None and not isinstance(cause, FastSAEError):
            cause = next((a for a in cause.args if isinstance(a, BaseException)), None) or cause.__context__
        if cause is not None:
            raise cause from None
        if not stopped.code:  # --help
            raise
        raise FastSAEError(one_line(said.getvalue(), argv, list(verbs))) from None


def _print_result(result: dict | Contributions | Estimate | Steering, as_json: bool) -> None:
    if not isinstance(result, dict):
        if not as_json:
            print(result)
            return
        result = result.to_dict()
    if as_json:
        print(json.dumps(result, indent=1, default=str))
        return
    for key, value in result.items():
        if isinstance(value, (int, float, str)):
            print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0; 2 for bad input, with one line on stderr; 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    argv = [word for word in argv if word != "--json"]
    try:
        verbs: dict[str, Any] = dict(VERBS)
        if argv[:1] in (["train"], ["estimate"]):
            verbs[argv[0]] = _with_preset(verbs[argv[0]], argv)
        _print_result(_parsed(verbs, argv)(), as_json)
        return 0
    except FastSAEError as error:
        return _fail(str(error))
    except ImportError as error:
        if not error.name:
            raise
        return _fail(f"this needs {error.name}, which is not installed: pip install 'fastsae[all]'")
    except BrokenPipeError:  # the reader of our output (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error.filename or 'writing'}): free some space; {again(argv, VERBS)}")
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print(f"\nfastsae: interrupted; {again(argv, VERBS)}", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"fastsae: {visible(' '.join(message.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
