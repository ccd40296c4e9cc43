"""Read and replace what a module inside a model puts out, by forward hooks; no model code is touched.

Works for any `nn.Module`. Outputs may be a tensor or a tuple, list or mapping whose first tensor is meant (Hugging Face
blocks return tuples); what else they hold is passed on unchanged.

Axes: B contexts, T tokens in a context, D width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.errors import FastSAEError


class _StopForward(BaseException):
    """Ends a forward pass at the hooked module. A BaseException: a model's own `except Exception` must not eat it."""


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path` ("transformer.h.0.mlp.act"), also by SAELens' names ("blocks.0.mlp.hook_post").

    Raises FastSAEError, offering near names, when there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules and path:
        return modules[path]
    translated = _translate(modules, path)
    if translated is not None:
        return modules[translated]
    names = [name for name in modules if name]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    if not near:  # a name without its prefix ("h.0.mlp") is closer to its owner than any measure of spelling says
        near = [name for name in names if name.endswith(path)][:3] or names[:3]
    raise FastSAEError(f"the model has no module {path!r}: did you mean {' or '.join(map(repr, near))}?")


def _translate(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """A hook point of TransformerLens as a module path, where a module's *output* is that tensor."""
    match = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?(resid_pre|resid_post|attn_out|mlp_out|mlp\.hook_post)", name)
    if match is None:
        return None
    layer, point = int(match[1]), match[2]
    if point == "resid_pre":
        layer, point = layer - 1, "resid_post"  # the stream before a block is the one after the block below
    stacks = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > layer >= 0]
    if not stacks:
        return None
    block = f"{min(stacks, key=len)}.{layer}"
    if point == "resid_post":
        return block
    if point == "mlp.hook_post":
        if f"{block}.mlp.gate_proj" in modules:  # act(gate) · up is no module's output
            raise FastSAEError(f"{name} is not the output of a module in a gated MLP: hook {block}.mlp instead")
        candidates = [f"{block}.mlp.{part}" for part in ("act", "act_fn", "activation_fn")] + [f"{block}.activation_fn"]
    elif point == "attn_out":
        candidates = [f"{block}.{part}" for part in ("attn", "self_attn", "attention")]
    else:
        candidates = [f"{block}.mlp"]
    return next((c for c in candidates if c in modules), None)


@contextmanager
def capture(model: nn.Module, path: str, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect the module's output of every forward pass in a list: [B, T, D] tensors, detached.

    stop: end the forward pass right there, and leave the `with` block: nothing behind the module is computed.

        with capture(model, "transformer.h.0.mlp.act", stop=True) as outputs:
            model(token_ids)
        x = outputs[0]
    """
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(_first_tensor(output, path).detach())
        if stop:
            raise _StopForward

    handle = find_module(model, path).register_forward_hook(hook)
    try:
        yield outputs
    except _StopForward:
        pass
    finally:
        handle.remove()


@contextmanager
def replace(model: nn.Module, path: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put function(x) in the place of the module's output x: [B, T, D] → the same shape."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        x = _first_tensor(output, path)
        new = function(x)
        if new.shape != x.shape:
            raise FastSAEError(f"the replacement at {path} must have shape {list(x.shape)}, got {list(new.shape)}")
        return _with_first_tensor(output, new.to(x.dtype))

    handle = find_module(model, path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _first_tensor(output: Any, path: str) -> Tensor:
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise FastSAEError(f"the output of {path} holds no tensor (it is a {type(output).__name__}): hook another module")


def _with_first_tensor(output: Any, new: Tensor) -> Any:
    """The output with its first tensor exchanged, of the same type."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if isinstance(v, Tensor))
        changed = dict(output) | {key: new}
        return type(output)(**changed)
    parts = list(output)
    parts[next(i for i, part in enumerate(parts) if isinstance(part, Tensor))] = new
    if hasattr(output, "_fields"):  # a named tuple takes its fields one by one
        return type(output)(*parts)
    return type(output)(parts)


@torch.no_grad()
def activations(model: nn.Module, hook: str, token_ids: Tensor) -> Tensor:
    """The hooked output for token ids [B, T]: [B, T, D]; nothing behind that module is computed.

    Right padding needs no attention mask: in a causal model no token sees what comes after it.
    Raises FastSAEError: no such module, or one that the forward pass does not run or whose output has another shape.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with capture(model, hook, stop=True) as outputs:
        model(token_ids.to(device))
    if not outputs:
        raise FastSAEError(f"the model's forward pass does not run {hook}: hook another module")
    x = outputs[0]
    if x.ndim != 3 or x.shape[:2] != token_ids.shape:
        raise FastSAEError(
            f"the output of {hook} must be [contexts, tokens, width], for {list(token_ids.shape)} token ids "
            f"got {list(x.shape)}: hook another module"
        )
    return x
