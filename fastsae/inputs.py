"""What the verbs of the command line read by name: a language model, a dictionary."""

import json
import sys
from pathlib import Path
from typing import Any

from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from fastsae.train import RESULT


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer, without transformers' own progress bars: one kind of bar on a terminal is enough."""
    from fastsae import lm as module

    quiet()
    return module.load(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone, of a model's folder or name."""
    from transformers import AutoTokenizer

    from fastsae.lm import not_loaded

    quiet()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FastSAEError(not_loaded(name, error)) from None


def load_beside(name: str, tokenizer: Any, model: str) -> Any:
    """The model `name`, to read the same token ids as `model`, whose tokenizer is given.

    Raises FastSAEError where it has another tokenizer: equal ids would be other tokens to it, and no figure would tell.
    """
    found, words = load_model(name)
    if words.get_vocab() != tokenizer.get_vocab():
        raise FastSAEError(f"{model} and {name} must share a tokenizer: they read the same tokens")
    return found


def quiet() -> None:
    """transformers and the hub say nothing of their own: what matters of it comes in our errors."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_sae(folder: Path, model: str | None = None, hook: str | None = None) -> SAE:
    """The SAE in a folder, or in the sae/ folder of a training run.

    model, hook: what is to be read with it; where the training run says that it was another, a warning goes to stderr.
    """
    sae = SAE.from_pretrained(folder)
    for name, given, known in zip(("model", "module"), (model, hook), _trained_on(folder), strict=True):
        if given is not None and known is not None and Path(given).name != Path(known).name:
            sys.stderr.write(f"warning: {folder} was trained on the {name} {known}, and reads {given} now\n")
    return sae


def _trained_on(folder: Path) -> tuple[str | None, str | None]:
    """Model and hook that fastsae.train noted, in the run's folder or the one above its sae/."""
    for path in (folder / RESULT, folder.parent / RESULT):
        if path.is_file():
            try:
                noted = json.loads(path.read_text(encoding="utf-8")).get("activations") or {}
                return noted.get("model"), noted.get("hook")
            except (ValueError, AttributeError):
                break
    return None, None
