"""A transformer and a tokenizer small enough for tests: nothing is downloaded, nothing trained."""

from typing import Any

import torch

WORDS = "the cat sat on a mat and the dog ran to town with his red ball while it rained all over green hills".split()


def tokenizer(bos: bool = True) -> Any:
    """Bytes and no merges; <|end|> begins and ends texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([""], trainer)
    ends = {"bos_token": "<|end|>", "eos_token": "<|end|>"} if bos else {"eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **ends)


def model(n_layer: int = 2, seed: int = 0) -> Any:
    """GPT-2 with width 16, MLP width 24 at transformer.h.{0,1}.mlp.act, contexts of 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=257,
            n_positions=64,
            n_embd=16,
            n_layer=n_layer,
            n_head=2,
            n_inner=24,
            activation_function="relu",
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.5,  # activations of a size that matters to the loss
        )
        return GPT2LMHeadModel(config).eval()


def documents(n: int = 30, words: int = 20, seed: int = 0) -> list[str]:
    """Texts of about 5 · words characters each."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (n, words), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]


def trained(steps: int = 60) -> Any:
    """The model after a second of training on `documents`: taking something away from it costs."""
    network, words = model(), tokenizer()
    end = words.eos_token_id
    stream = torch.tensor([i for text in documents(200, seed=9) for i in [end, *words(text).input_ids]])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    batches = stream[: len(stream) // 512 * 512].view(-1, 16, 32)
    for step in range(steps):
        batch = batches[step % len(batches)]
        network(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network
