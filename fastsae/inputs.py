"""What the verbs of the command line read by name: a language model, a dictionary."""

from pathlib import Path
from typing import Any

from fastsae.sae import SAE


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer, without transformers' own progress bars: one kind of bar on a terminal is enough."""
    from fastsae import lm as module

    quiet()
    return module.load(name)


def quiet() -> None:
    """transformers and the hub say nothing of their own: what matters of it comes in our errors."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_sae(folder: Path) -> SAE:
    """The SAE in a folder, or in the sae/ folder of a training run."""
    return SAE.from_pretrained(folder / "sae" if (folder / "sae" / "cfg.json").exists() else folder)
