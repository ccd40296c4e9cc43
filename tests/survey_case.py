"""What a survey's tests compare it with: everything about a small text, kept whole."""

from typing import Any

import numpy as np
import torch

from tests import analysis_case

OPTIONS: dict[str, Any] = {
    "categories": ("Arabic", "tokens:a"), "context": 32, "batch_size": 4, "around": 3, "top": 3, "bottom": 2,
    "per_interval": 2, "windows": 40,
}  # fmt: skip


def but(**changes: Any) -> dict[str, Any]:
    """OPTIONS with some of them changed."""
    return OPTIONS | changes


class Dense:
    """Everything about the text, kept whole: f [n, F], x [n, D], ids, document, position, half, label."""

    def __init__(self, sae, model, tokenizer, texts) -> None:
        rows = analysis_case.contexts(tokenizer, texts, 32)
        self.x = analysis_case.neurons(model, rows).numpy()
        with torch.no_grad():
            self.f = sae.encode(torch.from_numpy(self.x)).numpy().astype(np.float64)
        per_text = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.ids = np.concatenate(per_text)
        self.document = np.repeat(np.arange(len(texts)), [len(ids) for ids in per_text])
        self.position = np.concatenate([np.arange(len(ids)) for ids in per_text])
        self.context = np.concatenate([np.arange(len(ids)) // 31 for ids in per_text]) + 1000 * self.document
        words = [text.encode() for text in texts]
        arabic = np.concatenate([np.frombuffer(word, np.uint8) >= 0x80 for word in words])
        assert len(arabic) == len(self.ids)  # a token a byte
        self.arabic = arabic
        self.letter = self.ids == tokenizer("a", add_special_tokens=False)["input_ids"][0]
