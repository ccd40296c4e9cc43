"""A model, a dictionary and text in two scripts for the tests of fastsae.analysis: small, and the same each time."""

from typing import Any

import torch

from fastsae.sae import SAE
from tests import tiny_lm

HOOK = "transformer.h.0.mlp.act"  # width 24
ARABIC = "قطة على سجادة والكلب يركض إلى المدينة مع كرته الحمراء بينما تمطر فوق التلال الخضراء كلها".split()


def documents(n: int = 24, words: int = 14) -> list[str]:
    """n texts, every third of them Arabic with an English word."""
    generator = torch.Generator().manual_seed(5)
    texts = []
    for number in range(n):
        pool = ARABIC if number % 3 == 0 else tiny_lm.WORDS
        picks = torch.randint(len(pool), (words,), generator=generator).tolist()
        texts.append(" ".join([*(pool[i] for i in picks), "end"]))
    return texts


def case(seed: int = 0, **config: Any) -> tuple[SAE, Any, Any]:
    """(SAE of 40 latents on 24 neurons, one-layer model, byte tokenizer)."""
    model, tokenizer = tiny_lm.model(n_layer=1, seed=seed), tiny_lm.tokenizer()
    sae = SAE(d_in=24, d_sae=40, **{"activation": "relu", "seed": seed, **config})
    with torch.no_grad():
        sae.encoder.bias.sub_(0.3)
    sae.set_input_normalisation(None, 1.7)  # latents and neurons in different units, as after training
    return sae, model, tokenizer


def contexts(tokenizer: Any, texts: list[str], context: int) -> list[list[int]]:
    """Every document cut into contexts of its own behind a begin-of-text token, in order."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows += [[tokenizer.bos_token_id, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]
    return rows


@torch.no_grad()
def neurons(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Post-ReLU activations of all tokens but the first of each row, computed by the model's own parts: [n, 24]."""
    block, found = model.transformer.h[0], []
    for row in rows:
        ids = torch.tensor([row])
        stream = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(len(row)))
        stream = stream + block.attn(block.ln_1(stream))[0]
        found.append(block.mlp.c_fc(block.ln_2(stream)).relu()[0, 1:])
    return torch.cat(found)
