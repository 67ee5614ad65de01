"""How a model turns keys by their positions, asked of its own modules: one row goes through each layer's attention at some
positions, up to the cache, which gets the keys."""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import Any, Dict, Iterable, List, Tuple, Union

import torch
from transformers.cache_utils import DynamicCache

from .._types import Rope
from .geometry import text_config

_POSITIONS = [0, 1, 2, 5, 11, 23]
# By layer; or why it is not known: text, as an error that is kept keeps the frames that it was raised through.
_known: "weakref.WeakKeyDictionary[Any, Dict[int, Union[Rope, str]]]" = weakref.WeakKeyDictionary()


def ropes(model: Any, layers: Iterable[int]) -> List[Rope]:
    """Of these layers of a model, in this order, with as many pairs in each: those of layers that do not turn keys have the
    frequency 0. The model is asked once.

    Raises:
        ValueError: where that cannot be told, or layers turn different channels.
    """
    if model not in _known:
        _known[model] = _ask(model)
    found = []
    for layer in layers:
        answer = _known[model].get(layer, f"layer {layer} has no attention that could be asked")
        if isinstance(answer, str):
            raise ValueError(answer)
        found.append(answer)
    kinds = {(len(one.frequencies), one.neighbours) for one in found if one.frequencies}
    if len(kinds) > 1:
        raise ValueError("layers of this model turn different channels of their keys")
    pairs, neighbours = kinds.pop() if kinds else (0, False)
    return [one if one.frequencies else Rope((0.0,) * pairs, neighbours) for one in found]


class _Keys(Exception):
    """Carries keys [batch, kv_heads, n, head_dim] out of an attention module."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Listener(DynamicCache):
    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Keys(key_states)


def _ask(model: Any) -> Dict[int, Union[Rope, str]]:
    config = text_config(model)
    answers: Dict[int, Union[Rope, str]] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not type(module).__name__.endswith("Attention"):
            continue
        try:
            with torch.no_grad():
                turning, cos, sin = _turns(model, config, layer)
                answers[layer] = _match(_keys(model, module, config.hidden_size, cos, sin), cos, sin, turning)
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises; that keys are turned is no condition to serve it
            said = str(error) or type(error).__name__
            answers[layer] = f"layer {layer} ({type(module).__name__}) does not say how it turns keys by position: {said}"
    return answers


def _turns(model: Any, config: Any, layer: int) -> Tuple[Any, torch.Tensor, torch.Tensor]:
    """The module that makes the rotary embedding of a layer; its cosines and sines [n, width] at _POSITIONS, in float32."""
    modules = [one for one in model.modules() if any(name.endswith("inv_freq") for name, _ in one.named_buffers(recurse=False))]
    if len(modules) > 1:  # multimodal models have some for other parts
        modules = [one for one in modules if getattr(one, "config", None) is config]
    if len(modules) != 1:
        raise ValueError(f"{len(modules)} modules have an inv_freq")
    if (kind := getattr(modules[0], "rope_type", "")) in ("dynamic", "longrope"):
        raise ValueError(f"its frequencies depend on the length ({kind})")
    device = next(modules[0].buffers()).device
    arguments: List[Any] = [torch.zeros(1, device=device), torch.tensor([_POSITIONS], device=device)]
    if "layer_type" in inspect.signature(modules[0].forward).parameters and getattr(config, "layer_types", None):
        arguments.append(config.layer_types[layer])
    try:
        cos, sin = modules[0](*arguments)
        cos, sin = cos[0].float().cpu(), sin[0].float().cpu()
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises for arguments and shapes
        raise ValueError(f"{type(modules[0]).__name__}: {error}") from error
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"its rotary embedding has the shape {list(cos.shape)}")
    return modules[0], cos, sin


def _keys(model: Any, module: Any, width: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys [kv_heads, n, head_dim] of one row at _POSITIONS, in float64."""
    row = torch.randn((1, 1, width), generator=torch.Generator().manual_seed(1)).expand(1, len(_POSITIONS), width)
    device = next(itertools.chain(module.parameters(), module.buffers())).device  # quantised layers have buffers alone
    hidden, cos, sin = (one.to(device, model.dtype) for one in (row, cos[None], sin[None]))
    takes = inspect.signature(module.forward).parameters
    more = {"cache" if "cache" in takes else "past_key_values": _Listener()}
    if "shared_kv_states" in takes:
        more["shared_kv_states"] = {}
    try:
        module(hidden_states=hidden, position_embeddings=(cos, sin), attention_mask=None, **more)
    except _Keys as heard:
        return heard.keys[0].double().cpu()
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"it takes other arguments than rows and their rotary embedding: {error}") from error
    raise ValueError("it keeps no keys")


def _match(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turning: Any) -> Rope:
    """Which frequencies turn the first key into the others, and which channels they turn."""
    first, size, dim = keys[:, :1], keys.abs().max(), keys.shape[2]
    if bool(((keys - first).abs() < 1e-3 * size).all()):
        return Rope(())
    angles = torch.atan2(sin[1], cos[1]).double()  # at position 1; some models scale both
    width = len(angles)
    for frequencies in (angles, angles[: width // 2], angles[::2]):  # one of each pair, or both, side by side or apart
        n = len(frequencies)
        if 2 * n > dim:
            continue
        turned = torch.tensor(_POSITIONS, dtype=torch.float64)[:, None] * frequencies
        c, s = turned.cos(), turned.sin()
        for neighbours in (False, True):
            a = slice(0, 2 * n, 2) if neighbours else slice(0, n)
            b = slice(1, 2 * n, 2) if neighbours else slice(n, 2 * n)
            ours = first.repeat(1, len(_POSITIONS), 1)
            ours[..., a], ours[..., b] = c * first[..., a] - s * first[..., b], s * first[..., a] + c * first[..., b]
            if bool(((ours - keys).abs() < 0.03 * size).all()):  # bf16 keeps cosines within .004
                for name, buffer in turning.named_buffers():  # the same before they were rounded
                    exact = buffer.detach().double().cpu()
                    if name.endswith("inv_freq") and exact.shape == (n,) and torch.allclose(exact, frequencies, rtol=0.01, atol=1e-6):
                        frequencies = exact
                        break
                return Rope(tuple(frequencies.tolist()), neighbours)
    raise ValueError("neither halves nor neighbours of channels turn by the frequencies of its rotary embedding")
