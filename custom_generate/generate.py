"""Endless generation in constant memory: attention sinks (arXiv:2309.17453) for decoder-only transformers models.

The cache keeps the first `num_sink_tokens` tokens of a sequence and its latest `window_length - num_sink_tokens`.
From top to bottom: what differs between releases of transformers; how a model turns its keys with their position
(`Rotation`); which tokens one update keeps and attends to (`Step`); where equal layers keep them (`Ring`), and what one
layer does with them (`SinkLayer`); all layers, bound to a model (`SinkCache`) or driven by hand (`UnboundLayers`); what
the model is given for a step (`_streaming`); and `generate`, which ties them together.

Shapes: `rows` is the batch, or 1 where all its sequences agree; `pairs` are the pairs of dimensions that RoPE turns.
"""

import copy
import functools
import inspect
import itertools
import json
import operator
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional, Union

import safetensors
import safetensors.torch
import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel

# ---------------------------------------------------------------------------------------------------------------------
# Releases of transformers, 4.52 to 5.23: all that differs between them stands here
# ---------------------------------------------------------------------------------------------------------------------

try:
    from transformers.cache_utils import CacheLayerMixin
except ImportError:  # until 4.53 a cache had no layer objects
    CacheLayerMixin = object

# Until 4.53 a model sizes its mask by all tokens seen and uses its first columns: wrong once tokens were evicted.
MASKS_FOLLOW_THE_CACHE = CacheLayerMixin is not object

# 4.52 configurations have no `layer_types`: this attribute is what marks one with layers of several kinds.
HYBRID = "cache_implementation"

# Which kinds of layers (`layer_types`) the release's own cache keeps apart, None for all that its models have; and its
# classes for those that attend to all tokens, and for those that stay as they are in a stream: they slide, hold nothing
# or keep a state.
RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])
CACHED_KINDS, FULL_LAYERS, KEPT_LAYERS = {"full_attention"}, ["DynamicLayer"], []
if RELEASE >= (4, 56):
    CACHED_KINDS |= {"sliding_attention", "chunked_attention"}
    KEPT_LAYERS += ["DynamicSlidingWindowLayer", "DummyLayer"]
if RELEASE >= (5, 15):  # until then models forget a state where they get several tokens at once
    from transformers.cache_utils import LinearAttentionLayer as StateLayer

    CACHED_KINDS = None
    FULL_LAYERS += ["LinearAttentionAndFullAttentionLayer"]
    KEPT_LAYERS += ["LinearAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"]
else:

    class StateLayer:
        """No layer has a state that is kept."""


# What 5.2 and later put around a model's code, torch 2.6 can't compile, with any cache.
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
COMPILES = RELEASE < (5, 2) or TORCH >= (2, 7)

# Decoding modes that the release no longer has itself, but loads from repositories of the Hub: by the argument that
# asks for each.
MOVED_MODES = {}
if RELEASE >= (4, 56):
    MOVED_MODES |= {"dola_layers": "DoLa"}
if RELEASE >= (4, 57):
    MOVED_MODES |= {"num_beam_groups": "group beam search", "constraints": "constrained beam search"}
    MOVED_MODES |= {"force_words_ids": "constrained beam search"}

# What `generate` hands to a custom function about how it was found: 4.52 passes these three on,
ABOUT_THE_CALL = ("custom_generate", "trust_remote_code", "global_keys_to_exclude")
# and every release what says where on the Hub.
ABOUT_THE_CALL += ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "repo_type")


def _init_cache(cache: Cache) -> None:
    """Call `Cache.__init__` with what its release asks for, leaving `cache.layers` an empty list."""
    parameters = inspect.signature(Cache.__init__).parameters
    if "layers" in parameters:  # from 4.56
        Cache.__init__(cache, layers=[])
    elif "layer_classes" in parameters:  # 4.54 and 4.55 build a first layer at once
        Cache.__init__(cache, layer_classes=transformers.cache_utils.DynamicLayer)
    else:
        Cache.__init__(cache)
    cache.layers = []


def _own_cache(config: Any) -> DynamicCache:
    """The cache that transformers gives a model; until 4.55 it knows of no kinds of layers, and has none yet."""
    return DynamicCache(config=config) if KEPT_LAYERS else DynamicCache()


def _own_layers(model: PreTrainedModel) -> list:
    """The layers of that cache, where it knows the kinds."""
    return _own_cache(model.config).layers if KEPT_LAYERS else []


def _cached(cache: DynamicCache) -> list[dict[str, torch.Tensor]]:
    """Each layer's keys and values, `[batch, kv_heads, seq, head_dim]`; of a layer without, nothing."""
    if MASKS_FOLLOW_THE_CACHE:
        kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    else:
        kept = zip(cache.key_cache, cache.value_cache)
    return [{} if keys is None else {"keys": keys, "values": values} for keys, values in kept]


def _own_mask(kind: str, model: PreTrainedModel, cache: Cache, attended: torch.Tensor, length: int) -> Any:
    """The mask that transformers makes for layers of a kind, off the columns to attend to, `[batch, columns]`."""
    make = transformers.masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    arguments = inspect.signature(make).parameters
    states = torch.empty(len(attended), length, 0, dtype=model.dtype, device=attended.device)
    kwargs = {"input_embeds" if "input_embeds" in arguments else "inputs_embeds": states}  # renamed in 5.0
    if "cache_position" in arguments:  # until 5.3
        kwargs["cache_position"] = torch.arange(attended.shape[1], device=attended.device)[-length:]
    config = model.config.get_text_config(decoder=True)
    return make(config=config, attention_mask=attended, past_key_values=cache, **kwargs)


def _count_columns(kwargs: dict[str, Any], start: int, end: int, device: torch.device) -> None:
    """Set right which columns come next: until 5.3 `generate` counts them, wrongly where it gets new tokens only."""
    if "cache_position" in kwargs:
        kwargs["cache_position"] = torch.arange(start, end, device=device)


def _query_length(sizes: "torch.Tensor | int") -> int:
    """What `get_mask_sizes` is told of the new tokens: their positions until 5.3, their number later."""
    return sizes.shape[0] if isinstance(sizes, torch.Tensor) else sizes


# ---------------------------------------------------------------------------------------------------------------------
# How a model turns its keys
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rotation:
    """How the keys of a layer turn as their position grows (RoPE, arXiv:2104.09864).

    Args:
        frequencies: `[pairs]`, float64 on the CPU: radians by which each pair turns per position, negative if the model
            turns backwards.
        start: the first of the `2 * pairs` neighbouring dimensions of a head that turn.
        interleaved: whether a pair is two neighbours, or dimensions `i` and `pairs + i` of those that turn.
        tensor: which cached tensor turns: "keys", or "values" where latent attention (arXiv:2405.04434) keeps the
            turning part of its keys.
    """

    frequencies: torch.Tensor
    start: int
    interleaved: bool
    tensor: str

    def pairs(self, keys: torch.Tensor) -> torch.Tensor:
        """Those dimensions of `keys`, `[..., head_dim]`, that turn: a view, `[..., pairs, 2]`."""
        pairs = self.frequencies.numel()
        turning = keys[..., self.start : self.start + 2 * pairs]
        return turning.unflatten(-1, (pairs, 2)) if self.interleaved else turning.unflatten(-1, (2, pairs)).mT

    def turned(self, pairs: torch.Tensor, distances: list[int]) -> torch.Tensor:
        """`pairs` (float32 `[..., rows, kv_heads, seq, pairs, 2]`), each row's turned by so many positions.

        The angle is taken in float64: in float32 its own rounding would be felt after some ten thousand positions.
        """
        distances = torch.tensor(distances, dtype=torch.float64, device="cpu")
        angles = distances[:, None, None, None] * self.frequencies
        turns = torch.polar(torch.ones_like(angles), angles).to(pairs.device, torch.complex64)
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)

    def turn(self, keys: torch.Tensor, distances: list[int]) -> torch.Tensor:
        """Turn `keys` (`[rows, kv_heads, seq, head_dim]`) where they are, in float32: one rounding to their dtype."""
        pairs = self.pairs(keys)
        pairs.copy_(self.turned(pairs.float(), distances))
        return keys


@dataclass(frozen=True, eq=False)
class Reading:
    """What was found out about a model by running it on a few tokens.

    Args:
        dtype: the model's when it was read: casting a model rounds the frequencies in its buffers.
        rotations: how each layer turns its keys, None for one whose keys have no position.
        slots: shape, dtype and device of what each layer caches of text, alike in equal layers, empty if it is nothing.
        fingerprint: what the model is known by: its last keys for some tokens, float32 `[4, kv_heads, 1, head_dim]`.
        resumes: whether it goes on from a layer's state where it gets several tokens at once.
        counts: whether it counts positions on where it is given none.
    """

    dtype: torch.dtype
    rotations: list[Optional[Rotation]]
    slots: list[tuple]
    fingerprint: torch.Tensor
    resumes: bool
    counts: bool


_readings: "weakref.WeakKeyDictionary[PreTrainedModel, Reading]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def read_model(model: PreTrainedModel) -> Reading:
    """Find how each layer of `model` turns its keys, and what else a stream has to know.

    The model is run on single tokens, once at position 0 and once `distance` positions later. A token alone attends to
    itself whatever its position, so with relative positions the runs differ in the rotation of the keys and in nothing
    else. Each layer gets the rotation, among those that the model's own tensors suggest, that turns the first run's
    keys into the second's. Some more runs of a few tokens tell whether all that the model does is relative, and how it
    keeps its states, if it does. The result is remembered for as long as the model lives.

    Raises:
        ValueError: `model` takes no `position_ids`; no rotation explains its keys (learned positions); or what it does
            depends on where tokens are in the cache, or on positions themselves, as far as its dtype shows it.
    """
    if model in _readings and _readings[model].dtype == model.dtype:
        return _readings[model]
    name, advice = type(model).__name__, "Use a model with rotary position embeddings (RoPE)."
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"`model` ({name}) can't be streamed: its forward takes no `position_ids`, which a stream must choose to "
            f"keep them bounded. {advice}"
        )
    if model.training:
        advice = "It is in training mode, where dropout changes what it does: call `model.eval()` first."
    # Far enough that scaled frequencies, which differ in the slow pairs only, are told apart.
    distance = min(_trained_length(model.config) or 1024, 1024) - 1
    try:
        before, after = _cached_at(model, 0), _cached_at(model, distance)
        relative = _is_relative(model, distance)
    except Exception as error:
        raise ValueError(
            f"`model` ({name}) can't be streamed: it failed on a few tokens at positions 0 and {distance}, off which "
            f"its rotation is read: {error}"
        ) from error
    candidates = functools.cache(lambda head_dim, tensor: list(_candidates(model, head_dim, tensor)))
    rotations = []
    for layer_idx, (first, second) in enumerate(zip(before, after)):
        explanations = [
            _explain(first[tensor].cpu(), second[tensor].cpu(), distance, candidates(first[tensor].shape[-1], tensor))
            for tensor in first
        ]
        turning = [rotation for _, rotation in explanations if rotation is not None]
        if len(turning) > 1 or not all(found for found, _ in explanations):
            raise ValueError(
                f"`model` ({name}) can't be streamed: the keys of its layer {layer_idx} change with their position, "
                "but not by a rotation (learned position embeddings do this), so they can't be moved as tokens are "
                f"evicted. {advice}"
            )
        rotations.append(turning[0] if turning else None)
    if not any(rotations) and not (any(before) and _keeps_states(model) and _attends_to_a_set(model)):
        raise ValueError(
            f"`model` ({name}) can't be streamed: no layer turns its keys with their position, so the model knows the "
            "order of tokens from their places in the cache (ALiBi, relative biases), which a stream changes. "
            f"{advice}"
        )
    if not relative:
        raise ValueError(
            f"`model` ({name}) can't be streamed: what its tokens see of each other changes when all move by the same "
            "distance (some models scale their queries by position), and a stream moves them to keep positions "
            f"bounded. {advice}"
        )
    fingerprint = [cached for cached in before if cached][-1]["keys"].float().cpu()
    slots = [tuple((states.shape, states.dtype, states.device) for states in layer.values()) for layer in before]
    _readings[model] = Reading(model.dtype, rotations, slots, fingerprint, _resumes(model), _counts(model))
    return _readings[model]


def _cached_at(model: PreTrainedModel, position: int) -> list[dict[str, torch.Tensor]]:
    """What each layer caches for four single tokens at `position`: `[4, kv_heads, 1, head_dim]` each."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Spread over the vocabulary, so that no odd token (padding is often embedded as zero) decides alone.
    tokens = torch.tensor([[vocabulary * part // 8] for part in (1, 3, 5, 7)], device=_device(model))
    cache = _own_cache(model.config)
    model(input_ids=tokens, position_ids=torch.full_like(tokens, position), past_key_values=cache, use_cache=True)
    return _cached(cache)


def _some_tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Four rows of `length` tokens, int64."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(4 * length, device=_device(model)).view(4, length) % vocabulary


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model gets its tokens: on the CPU if accelerate keeps its weights elsewhere until they are needed."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The relative difference of the row that differs least: rounding may send a token to another expert in some."""
    expected, actual = expected.float().flatten(1), actual.float().flatten(1)
    return float(((expected - actual).norm(dim=-1) / expected.norm(dim=-1)).min())


def _is_relative(model: PreTrainedModel, distance: int) -> bool:
    """Whether four tokens give the same wherever they are, the last of them at position `distance` at most."""
    if distance < 4:
        return True
    tokens = _some_tokens(model, 4)
    positions = torch.arange(4, device=tokens.device).expand(4, 4)
    here, one_on, there = (
        model(
            input_ids=tokens,
            position_ids=positions + start,
            past_key_values=_own_cache(model.config),  # without, positions above 0 would make it look for several texts
            use_cache=True,
        ).logits
        for start in (0, 1, distance - 3)
    )
    noise = _difference(here, one_on)  # there, everything is rounded anew
    rounding = distance * torch.finfo(torch.float32).eps + torch.finfo(model.dtype).eps
    return _difference(here, there) <= 4 * (noise + rounding)


def _attends_to_a_set(model: PreTrainedModel) -> bool:
    """Whether a token gives the same when the 16 before it lie in the cache in reverse order."""
    tokens = _some_tokens(model, 17)
    positions = torch.arange(17, device=tokens.device).expand(4, -1)
    logits = []
    for reverse in (False, True):
        cache = _own_cache(model.config)
        for part in (slice(0, 16), slice(16, 17)):
            output = model(
                input_ids=tokens[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True
            )
            for layer in cache.layers:
                if reverse and getattr(layer, "keys", None) is not None:
                    layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
        logits.append(output.logits)
    return _difference(*logits) <= max(1e-5, 4 * torch.finfo(model.dtype).eps)


def _keeps_states(model: PreTrainedModel) -> bool:
    """Whether a layer of the model keeps a recurrent state."""
    return any(isinstance(layer, StateLayer) for layer in _own_layers(model))


def _resumes(model: PreTrainedModel) -> bool:
    """Whether two tokens after seven leave the states of the model's layers as nine at once do."""
    if not _keeps_states(model):
        return True
    tokens = _some_tokens(model, 9)
    positions = torch.arange(9, device=tokens.device).expand(4, -1)
    whole, parts = _own_cache(model.config), _own_cache(model.config)
    for cache, part in ((whole, slice(0, 9)), (parts, slice(0, 7)), (parts, slice(7, 9))):
        model(input_ids=tokens[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True)
    # What a layer makes of it shows in the next one at the latest, and further on there is more noise.
    states = [layer_idx for layer_idx, layer in enumerate(whole.layers) if isinstance(layer, StateLayer)]
    noise = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    return all(
        float((tensor.float() - there[name].float()).norm()) <= noise * float(tensor.float().norm())
        for here, there in zip(map(_tensors, whole.layers[: states[:2][-1] + 1]), map(_tensors, parts.layers))
        for name, tensor in here.items()
    )


def _counts(model: PreTrainedModel) -> bool:
    """Whether a second token gets position 1 where the model, which keeps states, is given none."""
    if not _keeps_states(model):
        return True
    tokens, keys = _some_tokens(model, 2), []
    for positions in ({}, {"position_ids": torch.ones_like(tokens[:, 1:])}):
        cache = _own_cache(model.config)
        model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
        model(input_ids=tokens[:, 1:], past_key_values=cache, use_cache=True, **positions)
        keys.append([layer["keys"] for layer in _cached(cache) if layer][-1])
    return _difference(*keys) <= 4 * torch.finfo(model.dtype).eps


def _candidates(model: PreTrainedModel, head_dim: int, tensor: str) -> Iterator[Rotation]:
    """Every rotation of `head_dim` dimensions whose frequencies may stand somewhere in the model."""
    seen: list[torch.Tensor] = []
    for frequencies in _frequencies(model):
        if 2 * frequencies.numel() > head_dim or any(torch.equal(frequencies, other) for other in seen):
            continue
        seen.append(frequencies)
        for start in sorted({0, head_dim - 2 * frequencies.numel()}):
            for interleaved in (False, True):
                for direction in (1, -1):
                    yield Rotation(direction * frequencies, start, interleaved, tensor)


def _frequencies(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """What may be frequencies among the tensors that are no weights of `model`: `[pairs]`, float64 on the CPU.

    That is each vector, and the angles of position 1 in each table of sines and cosines, `[positions, 2 * pairs]`.
    """
    for module in model.modules():
        for tensor in [*module._buffers.values(), *vars(module).values()]:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if tensor.dim() == 1:
                yield tensor.detach().to("cpu", torch.float64)
            elif tensor.dim() == 2 and min(tensor.shape) > 1 and tensor.shape[1] % 2 == 0:
                first, second = tensor[1].detach().to("cpu", torch.float64).chunk(2)
                if torch.allclose(first**2 + second**2, torch.ones_like(first), atol=1e-2):
                    yield from (torch.atan2(first, second), torch.atan2(second, first))


def _explain(
    before: torch.Tensor, after: torch.Tensor, distance: int, candidates: list[Rotation]
) -> tuple[bool, Optional[Rotation]]:
    """Whether `before` became `after` (`[batch, kv_heads, 1, head_dim]`) by a rotation, or by none, and by which."""
    # Rounding of the keys, and of the angle, which models compute in float32.
    tolerance = 4 * (torch.finfo(before.dtype).eps + distance * torch.finfo(torch.float32).eps)
    before, after = before.float(), after.float()

    def error(rotation: Optional[Rotation]) -> float:
        turned = rotation.turn(before.clone(), [distance]) if rotation else before
        return float((turned - after).norm() / after.norm())

    best = min([None, *candidates], key=error)
    return error(best) <= tolerance, best


def _rope_parameters(config: Any) -> list[dict]:
    """The model's RoPE settings: one dict, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def _trained_length(config: Any) -> Optional[int]:
    """The smallest length the configuration names: below it no model changes its frequencies, or scales its queries."""
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "original_max_position_embeddings", "floor_scale")  # the last scales queries
    named = [getattr(config, name, None) for name in names]
    named += [settings.get("original_max_position_embeddings") for settings in _rope_parameters(config)]
    return min((int(length) for length in named if length), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# What one update keeps and attends to
# ---------------------------------------------------------------------------------------------------------------------


def _additive(attends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that attention adds to its scores where it `attends` or not."""
    return torch.zeros_like(attends, dtype=dtype).masked_fill_(~attends, torch.finfo(dtype).min)


class Step:
    """The plan of one update, the same for every layer: plain integers, so that nothing waits for the device.

    A row's tokens are counted without its left padding. Token `t` lives in slot `t` while `t < window_length`, after
    that in the slot of the window's oldest token: the sinks' slots never change, the others are a ring. One token is
    written over the one it evicts and attends to whatever the slots hold. Before several tokens the oldest are evicted
    all at once; then the new ones attend to what is left and causally to each other, as in transformers<4.53.

    Args:
        window_length, num_sink_tokens: of the cache.
        start: columns (tokens, padding included) seen before this update.
        length: columns of this update.
        pads: each row's columns of left padding.
        offsets: by how much each row's positions are kept below its token counts.
    """

    def __init__(
        self, window_length: int, num_sink_tokens: int, start: int, length: int, pads: list[int], offsets: list[int]
    ):
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.start, self.length = start, length
        self.held = [max(start - pad, 0) for pad in pads]
        self.new = [min(length, max(start + length - pad, 0)) for pad in pads]
        self.kept = [min(held, max(window_length - new, num_sink_tokens)) for held, new in zip(self.held, self.new)]
        self.num_keys = max(self.kept) + length
        # The sinks sit directly before the oldest kept token (section 3.2), in the positions that the model was given.
        self.shifts = [held - kept - offset for held, kept, offset in zip(self.held, self.kept, offsets)]
        self.evicts = any(held + new > window_length for held, new in zip(self.held, self.new))
        self.needs_mask = min(self.kept) < max(self.kept) or min(self.new) < length
        self.slots = [self.slot(held) for held in self.held]  # of each row's first new token
        self.prepared = False  # whether the model was given positions and a mask made for this step

    def slot(self, token: int) -> int:
        """Where token number `token` of a row is stored."""
        if token < self.window_length:
            return token
        return self.num_sink_tokens + (token - self.num_sink_tokens) % (self.window_length - self.num_sink_tokens)

    @functools.cached_property
    def attended(self) -> torch.Tensor:
        """The slots of the kept tokens, oldest first: int64 `[rows, max(kept)]`, rows with fewer filled up with 0."""
        attended = []
        for held, kept in zip(self.held, self.kept):
            sinks = min(held, self.num_sink_tokens)
            tokens = [*range(sinks), *range(held - kept + sinks, held)]
            attended.append([self.slot(token) for token in tokens] + [0] * (max(self.kept) - kept))
        return torch.tensor(attended, dtype=torch.long, device="cpu")

    @functools.cached_property
    def stored(self) -> tuple:
        """`(rows, columns, slots)`: the new tokens `[rows, :, columns]` outlive this update, in `[rows, :, slots]`."""
        room = self.window_length - self.num_sink_tokens
        entries = [
            (row, self.length - new + token - held, self.slot(token))
            for row, (held, new) in enumerate(zip(self.held, self.new))
            for token in range(held, held + new)
            if token < self.num_sink_tokens or token >= held + new - room
        ]
        rows, columns, slots = torch.tensor(entries, dtype=torch.long, device="cpu").view(-1, 3).unbind(1)
        return slice(None) if len(self.held) == 1 else rows, columns, slots

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask over the keys that `SinkLayer.update` returns: `[rows, 1, length, num_keys]`."""
        kept, new = (torch.tensor(count, device="cpu")[:, None, None] for count in (self.kept, self.new))
        column = torch.arange(self.num_keys, device="cpu")
        if self.length == 1:
            attends = column < kept + new
        else:
            old = (column[: max(self.kept)] < kept).expand(-1, self.length, -1)
            column = column[: self.length]
            attends = torch.cat([old, (column <= column[:, None]) & (column >= self.length - new)], dim=-1)
        return _additive(attends[:, None], dtype).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The slots, and one layer's keys and values
# ---------------------------------------------------------------------------------------------------------------------


class Ring:
    """The slots of equal layers, in one piece of memory: their sinks move together, once a step.

    RoPE sees only differences of positions, so moving the window back as tokens leave it is the same as moving the
    sinks forward: the window's keys stay as the model made them, and the few sinks are turned anew at each step, always
    from what the model made.

    Args:
        window_length, num_sink_tokens: of the cache.
        rotation: how these layers turn their keys; None if they don't.

    Attributes:
        keys, values: `[layers, batch, kv_heads, window_length, head_dim]`.
        rows, slots: where compiled code writes each row's token: int64 `[batch]`.
    """

    def __init__(self, window_length: int, num_sink_tokens: int, rotation: Optional[Rotation]):
        self.window_length, self.num_sink_tokens, self.rotation = window_length, num_sink_tokens, rotation
        self.num_layers = 0
        self.keys = self.values = None
        # What turns of the sinks as the model made it, once that in the slots was moved:
        self.sinks: Optional[torch.Tensor] = None  # float32 `[layers, batch, kv_heads, sinks, pairs, 2]`
        self.shifts = [0]  # how far the sinks in the slots were moved, each row's

    @torch.inference_mode(False)
    def allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for keys and values like these, `[batch, kv_heads, seq, head_dim]`."""
        keys, values = (
            states.new_zeros(self.num_layers, *states.shape[:2], self.window_length, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.hold(keys, values)
        if self.rotation is not None:
            shape = self._turning(slice(0, self.num_sink_tokens)).shape
            self.sinks = torch.zeros(shape, device=keys.device)

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over `keys` and `values`."""
        self.keys, self.values = keys, values
        self.rows = torch.arange(keys.shape[1], device=keys.device)
        self.slots = torch.zeros_like(self.rows)
        _write_where_it_is(self.rows, self.slots)

    @torch.inference_mode(False)
    def follow(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Go to the device, and take on the dtype, of keys and values like these."""
        self.hold(self.keys.to(key_states), self.values.to(value_states))
        self.sinks = None if self.sinks is None else self.sinks.to(key_states.device)

    def _turning(self, slots: slice) -> torch.Tensor:
        """What turns in these slots: a view, `[layers, batch, kv_heads, slots, pairs, 2]`."""
        turning = self.values if self.rotation.tensor == "values" else self.keys
        return self.rotation.pairs(turning[:, :, :, slots])

    def move_sinks(self, shifts: list[int]) -> None:
        """Put each row's sinks so far from where the model did, if they are not there."""
        moves = shifts != self.shifts and (any(shifts) or any(self.shifts))
        if not moves or self.rotation is None or self.num_sink_tokens == 0:
            return
        in_slots = self._turning(slice(0, self.num_sink_tokens))
        if not all(self.shifts):  # those of some rows have not moved yet
            unmoved = torch.tensor([shift == 0 for shift in self.shifts], device=in_slots.device)
            self.sinks.copy_(torch.where(unmoved[:, None, None, None, None], in_slots.float(), self.sinks))
        in_slots.copy_(self.rotation.turned(self.sinks, shifts))
        self.shifts = shifts

    def shift_back(self, distances: list[int]) -> None:
        """Lower the positions of the window's keys by `distances`, each row's; the sinks follow at the next update."""
        if self.rotation is not None and self.keys is not None:
            for window in self._turning(slice(self.num_sink_tokens, None)):  # by layers: less memory in between
                window.copy_(self.rotation.turned(window.float(), [-distance for distance in distances]))

    @torch.inference_mode(False)
    def reorder(self, indices: torch.Tensor) -> None:
        """Make row `i` of the batch what row `indices[i]` was."""
        if self.keys is not None:
            rows = indices.to(self.keys.device)
            self.hold(self.keys.index_select(1, rows), self.values.index_select(1, rows))
            self.sinks = None if self.sinks is None else self.sinks.index_select(1, rows)
        if len(self.shifts) > 1:
            self.shifts = [self.shifts[row] for row in indices.tolist()]


def _write_where_it_is(*tensors: torch.Tensor) -> None:
    """Have CUDA graphs write into these tensors. Without a guard: for another cache's, the code stays the same."""
    if not torch.compiler.is_compiling():  # as a prompt is, if it was the user who compiled the model
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)


def _alike(held: "Ring | SinkLayer", key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    """Whether what is held is where such keys and values are, and of their dtype: not after a turn under autocast."""
    keys, values = held.keys, held.values
    return keys.device == key_states.device and keys.dtype == key_states.dtype and values.dtype == value_states.dtype


class SinkLayer(CacheLayerMixin):
    """The sinks and the window of one attention layer, which it keeps in a `Ring` with its equals.

    `keys` and `values` are `[batch, kv_heads, window_length, head_dim]`, by slots.
    """

    is_sliding = False
    keys = values = None

    def __init__(self, ring: Ring):
        super().__init__()
        self.ring, self.index = ring, ring.num_layers
        ring.num_layers += 1
        self.seen = 0  # columns
        self.is_initialized = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("keys", "values")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.look()  # copies of views would be no views

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Have slots for keys and values like these, `[batch, kv_heads, seq, head_dim]`, where they are."""
        ring = self.ring
        if ring.keys is None:
            ring.allocate(key_states, value_states)
        elif not _alike(ring, key_states, value_states):
            if self.index > 0:  # what was held in one place is in several now
                ring = self.leave()
            ring.follow(key_states, value_states)
        self.is_initialized = True
        self.look()

    def look(self) -> None:
        """Take over what the ring holds of this layer."""
        if self.is_initialized:
            self.keys, self.values = self.ring.keys[self.index], self.ring.values[self.index]
            _write_where_it_is(self.keys, self.values)

    def leave(self) -> Ring:
        """Take this layer's part out of its ring, into a ring of its own."""
        old, part = self.ring, slice(self.index, self.index + 1)
        self.ring, self.index = Ring(old.window_length, old.num_sink_tokens, old.rotation), 0
        self.ring.keys, self.ring.values, self.ring.shifts = old.keys[part], old.values[part], old.shifts
        self.ring.sinks = None if old.sinks is None else old.sinks[part]
        return self.ring

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in `step.length` new tokens, `[batch, kv_heads, length, head_dim]`; return what they attend to.

        Returns:
            Keys and values, `[batch, kv_heads, step.num_keys, head_dim]`: a view of the slots for one token, and in the
            order of the sequence, new tokens last, for several.
        """
        key_states, value_states = key_states.detach(), value_states.detach()  # slots outlive any autograd graph
        if not self.is_initialized or not _alike(self, key_states, value_states):
            SinkLayer.lazy_initialization(self, key_states, value_states)
        self.ring.move_sinks(step.shifts)
        keys, values = key_states, value_states
        if step.length > 1 and max(step.kept) > 0:
            keys = torch.cat([self._attended(self.keys, step), keys], dim=2)
            values = torch.cat([self._attended(self.values, step), values], dim=2)
        if step.length == 1 and step.new == [1]:  # plain decoding: a view is faster than an index
            slot = slice(step.slots[0], step.slots[0] + 1)
            self.keys[:, :, slot], self.values[:, :, slot] = key_states, value_states
        else:
            rows, columns, slots = step.stored
            self.keys[rows, :, slots] = key_states[rows, :, columns]
            self.values[rows, :, slots] = value_states[rows, :, columns]
        self.seen = step.start + step.length
        if step.length > 1:
            return keys, values
        if step.num_keys == self.ring.window_length:
            return self.keys, self.values
        return self.keys[:, :, : step.num_keys], self.values[:, :, : step.num_keys]

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` with one token, in tensors alone: each row's goes into `ring.slots`; all slots are returned."""
        self.keys[self.ring.rows, :, self.ring.slots] = key_states[:, :, 0]
        self.values[self.ring.rows, :, self.ring.slots] = value_states[:, :, 0]
        return self.keys, self.values

    @staticmethod
    def _attended(buffer: torch.Tensor, step: Step) -> torch.Tensor:
        batch, heads, _, head_dim = buffer.shape
        return buffer.gather(2, step.attended.to(buffer.device)[:, None, :, None].expand(batch, heads, -1, head_dim))

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """The most tokens kept."""
        return self.ring.window_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, sizes: "torch.Tensor | int") -> tuple[int, int]:
        """How many keys an update returns for so many new tokens, without padding, and the column of the first."""
        length, ring = _query_length(sizes), self.ring
        num_keys = Step(ring.window_length, ring.num_sink_tokens, self.seen, length, [0], [0]).num_keys
        return num_keys, self.seen + length - num_keys


class StateAndSinkLayer(SinkLayer, StateLayer):
    """A layer with an attention to all tokens and a recurrent state side by side (arXiv:2411.13676): both are kept.

    Args:
        number_of_states: how many states it has.
        ring: of `SinkLayer`.
    """

    def __init__(self, number_of_states: int, ring: Ring):
        SinkLayer.__init__(self, ring)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, **kwargs) -> None:
        """Allocate for a state; `SinkLayer.update` sees to the keys and values."""
        StateLayer.lazy_initialization(self, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


class _ModelReference(weakref.ref):
    """Does not keep its model alive, and is left behind when the cache goes to another process."""

    def __deepcopy__(self, memo: dict) -> "_ModelReference":
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


def _integer(name: str, value: Any) -> int:
    """The number of tokens that `value` is, of whatever type of integers; TypeError if it is none."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int (a number of tokens), got {value!r}.") from None


class SinkCache(Cache):
    """A cache that keeps the first tokens of a sequence and a window of its latest ones (arXiv:2309.17453).

    *Bound* to a model (`cache.bind(model)`, which `generate` does), it streams: token `t` attends to the first
    `num_sink_tokens` tokens and to the last `window_length - num_sink_tokens`, itself included, with the sinks directly
    before the oldest of these. `get_seq_length()` is the number of tokens seen. That is of layers that attend to all
    tokens; those that slide, attend by chunks or keep a state have the cache that transformers gives them, beside.

    *Unbound*, it is the class that transformers had until 4.52, bit for bit, for code that passes `sin` and `cos` to
    `update` itself: kept keys move back at every step, in their own dtype, and `get_seq_length()` is the number of
    tokens stored. Told neither `sin` nor `cos`, it refuses to evict.

    All of that holds in `generate` below, and in a loop of your own that calls `model(**cache.prepare_inputs(...))`. In
    calls without either (`model(input_ids, past_key_values=cache)`, or a plain `model.generate(past_key_values=cache)`)
    the cache sees neither mask nor positions. They hold for one row, not padded, up to the length that the model was
    trained on. Refused are a batch that must evict, steps past that length, going on with rows that were padded or
    shifted back, and before transformers 4.54 several tokens at once on a full window. What the cache can't see there,
    and is wrong: one row that is padded, and `position_ids` other than the model's own.

    Args:
        window_length (`int`, defaults to 256): the most tokens kept, sinks included.
        num_sink_tokens (`int`, defaults to 4): how many of them are the first of the sequence.

    Attributes:
        key_cache, value_cache (`list[torch.Tensor]`): a tensor a layer, `[batch, kv_heads, tokens kept, head_dim]`; in
            order of the sequence if unbound, and as stored if bound.

    Raises:
        TypeError: an argument is no integer.
        ValueError: not `0 <= num_sink_tokens < window_length`.
    """

    is_compileable = False  # but in `generate`, which prepares each step: see `_streaming`

    def __init__(self, window_length: int = 256, num_sink_tokens: int = 4):
        window_length = _integer("window_length", window_length)
        num_sink_tokens = _integer("num_sink_tokens", num_sink_tokens)
        if window_length < 1:
            raise ValueError(f"`window_length` must be at least 1, got {window_length}.")
        if not 0 <= num_sink_tokens < window_length:
            raise ValueError(
                f"`num_sink_tokens` must be at least 0 and less than `window_length` ({window_length}), which counts "
                f"the sinks too, got {num_sink_tokens}."
            )
        _init_cache(self)
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self._model: Optional[_ModelReference] = None
        self._fingerprint: Optional[torch.Tensor] = None  # of that model
        self._rotations: list[Optional[Rotation]] = []
        self._resumes = self._counts = True
        self._new_layers: list = []  # what `layers` are before the first token
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; a bound cache stays bound."""
        self.layers = copy.deepcopy(self._new_layers)
        self.static = False  # whether compiled code writes the next token
        self._slots_mask: Optional[torch.Tensor] = None
        self.pads: Optional[list[int]] = None  # each row's left padding, None as long as no mask was seen
        self.offsets = [0]  # by how much each row's positions are lowered
        self.step: Optional[Step] = None
        self.latest_ids: Optional[torch.Tensor] = None  # the last tokens that `generate` was passed
        self.latest_end = 0  # the column after them
        self._unbound = UnboundLayers(self.window_length, self.num_sink_tokens)

    def bind(self, model: PreTrainedModel) -> "SinkCache":
        """Read the rotation of every layer off `model` and stream from now on.

        Args:
            model: a decoder-only model with relative positions. It is run on a few tokens, once in its life, and
                nothing is changed on it; the cache does not keep it alive.

        Returns:
            This cache.

        Raises:
            ValueError: the cache is bound to another model or already holds tokens, or `model` can't be streamed.
        """
        model = _unwrapped(model)
        bound_to = None if self._model is None else self._model()
        if bound_to is model:
            return self
        if bound_to is not None:
            raise ValueError(
                "The `SinkCache` in `past_key_values` is bound to another model, whose keys and values mean nothing to "
                "this one. Use a `SinkCache` for each model."
            )
        if not self.is_bound and self.get_seq_length() > 0:
            raise ValueError(
                f"The `SinkCache` in `past_key_values` was not bound when it took in its {self.get_seq_length()} "
                "tokens. Call `bind(model)` before the first token, or `reset()` it."
            )
        _refuse_model(model, self.window_length)
        reading = read_model(model)
        if self.is_bound:
            _refuse_other_model(reading.fingerprint, self._fingerprint)
        else:
            self._rotations = reading.rotations
            self._new_layers = _layers(model, self.window_length, self.num_sink_tokens, reading)
            self.layers = copy.deepcopy(self._new_layers)
        self._fingerprint, self._resumes, self._counts = reading.fingerprint, reading.resumes, reading.counts
        # Far enough above the window that shifting back is rare, and above those of layers that slide by themselves, so
        # that no key meets it twice; low enough that float32 is exact about angles.
        reaches = [getattr(layer, "sliding_window", 0) for layer in self.layers]
        ceiling = max(4 * self.window_length, 4096, *reaches)
        self._trained_length = _trained_length(model.config) or ceiling
        self._ceiling = max(self.window_length, min(ceiling, self._trained_length))
        self._model = _ModelReference(model)
        return self

    @property
    def is_bound(self) -> bool:
        """Whether `bind` was called, if only in the process that this conversation comes from."""
        return len(self.layers) > 0  # and not `bool`, which torch 2.6 can't compile of a list

    @property
    def _rings(self) -> list[Ring]:
        return list(dict.fromkeys(layer.ring for layer in self.layers if isinstance(layer, SinkLayer)))

    @property
    def _sinks_only(self) -> bool:
        """Whether no layer slides, or keeps a state, by itself."""
        return all(type(layer) is SinkLayer for layer in self.layers)

    @property
    def key_cache(self) -> list[torch.Tensor]:
        return [getattr(layer, "keys", None) for layer in self.layers] if self.is_bound else self._unbound.keys

    @property
    def value_cache(self) -> list[torch.Tensor]:
        return [getattr(layer, "values", None) for layer in self.layers] if self.is_bound else self._unbound.values

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache's tensors take."""
        if self.is_bound:
            tensors = [tensor for layer in self.layers for tensor in _tensors(layer).values()]
            tensors += [ring.sinks for ring in self._rings if ring.sinks is not None]
        else:
            tensors = self.key_cache + self.value_cache
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_kwargs: Optional[dict[str, Any]] = None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the keys and values of new tokens; return those that the new tokens attend to.

        Args:
            key_states: `[batch, kv_heads, length, head_dim]`, turned to their positions by the model.
            value_states: `[batch, kv_heads, length, value_head_dim]`.
            layer_idx: the layer that they are of.
            cache_kwargs: for an unbound cache: `sin` and `cos`, `[length, rotary_dim]` of the whole window or
                `[1, length, rotary_dim]` of the new tokens, and `partial_rotation_size`, how many leading dimensions
                turn if not all do.

        Returns:
            Keys and values with the tokens attended to in dimension 2.

        Raises:
            ValueError: an unbound cache would have to evict and was given no `sin` and `cos`; or the model of a bound
                one was called without its `prepare_inputs` where it needs them.
        """
        if not self.is_bound:
            return self._unbound.update(key_states, value_states, layer_idx, cache_kwargs or {})
        layer = self.layers[layer_idx]
        if self.static:
            return layer.write(key_states, value_states)
        if not isinstance(layer, SinkLayer):
            return layer.update(key_states, value_states, cache_kwargs, *args, **kwargs)
        step = self.plan(layer.seen, key_states.shape[2])
        if not step.prepared:
            self._refuse_unprepared(step, key_states.shape[0])
        return layer.update(key_states, value_states, step)

    def _refuse_unprepared(self, step: Step, batch_size: int) -> None:
        """Raise if the mask or the positions that the model makes by itself can't be right for this step, or known."""
        if any(self.pads or []) or any(self.offsets):
            reason = "its rows were padded, or their positions shifted back, so the model's own count of them is off"
        elif step.start > 0 and not self._counts:
            reason = "the model would start over from position 0"
        elif step.start + step.length > self._trained_length:
            reason = f"the model would count positions past the {self._trained_length} that it was trained on"
        elif step.evicts and batch_size > 1 and self.pads is None:
            reason = f"it can't see whether any of these {batch_size} rows is padded, so not what to evict"
        elif step.length > 1 and step.start > 0 and not self._resumes:
            reason = "the model forgets its states where it gets several tokens at once, so pass one at a time"
        elif step.length > 1 and step.evicts and step.start > 0 and not MASKS_FOLLOW_THE_CACHE:
            reason = f"transformers {transformers.__version__} would mask {step.length} tokens on a full window wrongly"
        else:
            return
        raise ValueError(
            f"A `SinkCache` can't go on outside of its `generate`: {reason}. Use `generate`, or call the model with "
            "`**past_key_values.prepare_inputs(input_ids, attention_mask)`."
        )

    def prepare_inputs(self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None) -> dict[str, Any]:
        """What to call the bound model with for the next tokens, in a loop of your own: `model(**prepare_inputs(...))`.

        Args:
            input_ids: the new tokens, int64 `[batch, length]`. Several that evict do so all at once, before any of them
                attends: pass a long prompt by a few.
            attention_mask: `[batch, tokens seen + length]`, 0 for the left padding of a row and 1 for a token, which
                each row has at least one of. Not needed without padding, or again.

        Returns:
            `input_ids`, `position_ids` (int64 `[rows, length]`, bounded), `attention_mask` (None, or `[rows, 1, length,
            keys]`) and `past_key_values`, this cache: for the next call of the model and for no other.

        Raises:
            ValueError: the cache is not bound, or the arguments don't fit to what it holds.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError(
                "The `SinkCache` must be bound first, to a model that is still there: `cache.bind(model)`."
            )
        self._refuse_half_a_step()
        start, (batch_size, length) = self.get_seq_length(), input_ids.shape
        needed = [batch_size, start + length]
        if attention_mask is not None and list(attention_mask.shape) != needed:
            raise ValueError(
                f"`attention_mask` must be {needed}, for {start} tokens seen and {length} new ones, got "
                f"{list(attention_mask.shape)}."
            )
        at_once = self._ceiling - min(start, self.num_sink_tokens) if start == 0 or self._resumes else 1
        if length > at_once:
            raise ValueError(f"`input_ids` must be at most {at_once} tokens at a time for this model, got {length}.")
        pads = self.pads if start > 0 and attention_mask is None else None
        _begin(self, batch_size, _left_padding(attention_mask) if pads is None else pads)
        inputs = {"input_ids": input_ids, "attention_mask": None, "past_key_values": self}
        return _inputs_for_step(model, self, inputs)

    def plan(self, start: int, length: int) -> Step:
        """The step of `length` new tokens after `start`: made by the first layer that asks, shared by the others."""
        if self.step is None or (self.step.start, self.step.length) != (start, length):
            self.step = Step(self.window_length, self.num_sink_tokens, start, length, self.pads or [0], self.offsets)
        return self.step

    def bound_positions(self, length: int) -> None:
        """Before `length` new tokens would reach the ceiling, shift all kept keys back to before position 0.

        That costs O(window_length) once in about `ceiling` tokens, and each key meets it at most once before it leaves
        the window. Keys may lie at negative positions: the model is given those of the new tokens only.
        """
        step = self.plan(self.get_seq_length(), length)
        distances = [
            held - offset if held > self.num_sink_tokens and held - offset + new > self._ceiling else 0
            for held, new, offset in zip(step.held, step.new, self.offsets)
        ]
        if any(distances):
            for ring in self._rings:
                ring.shift_back(distances)
            for layer, rotation in zip(self.layers, self._rotations):
                if not isinstance(layer, SinkLayer) and rotation is not None and rotation.tensor in _tensors(layer):
                    states = getattr(layer, rotation.tensor).clone()
                    setattr(layer, rotation.tensor, rotation.turn(states, [-distance for distance in distances]))
            self.offsets = [offset + distance for offset, distance in zip(self.offsets, distances)]
            self.step = None

    def point_slots(self, step: Step, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Do what compiled code leaves out of a `step` of one token, which are all the numbers; return its mask.

        The mask is additive, `[rows, 1, 1, window_length]`, and hides the slots that are not filled yet. It stays when
        all are: without a mask, the code would be another.
        """
        for ring in self._rings:
            ring.move_sinks(step.shifts)
            ring.slots.copy_(torch.tensor(step.slots, device="cpu"))
        if self._slots_mask is None:
            held = torch.tensor(step.held, device=device)[:, None]
            filled = torch.arange(self.window_length, device=device) <= held
            self._slots_mask = _additive(filled[:, None, None], dtype)
        elif min(step.held) < self.window_length:
            self._slots_mask[range(len(step.slots)), :, :, step.slots] = 0
        return self._slots_mask

    def _refuse_half_a_step(self) -> None:
        """Raise if an error left the cache in the middle of a forward pass, where some layers took in its tokens."""
        counts = {getattr(layer, "seen", getattr(layer, "cumulative_length", None)) for layer in self.layers}
        counts -= {None}  # of layers that don't count
        step, has_states = self.step, any(isinstance(layer, StateLayer) for layer in self.layers)
        if len(counts) > 1 or (
            has_states and step is not None and step.prepared and {step.start + step.length} != counts
        ):
            raise ValueError(
                "The `SinkCache` in `past_key_values` was left in the middle of a forward pass by an error: its layers "
                "disagree about the tokens seen. `reset()` it, or use a new one."
            )

    def written(self) -> None:
        """Count the token that compiled code wrote."""
        for layer in self.layers:
            layer.seen = self.step.start + 1

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        """Tokens seen, padding included, if bound; tokens stored if not."""
        if layer_idx >= len(self.layers if self.is_bound else self._unbound.keys):
            return 0
        return self._counting(layer_idx).get_seq_length() if self.is_bound else self._unbound.keys[layer_idx].shape[-2]

    def _counting(self, layer_idx: int) -> Any:
        """The layer `layer_idx`, or where it does not count its tokens, the first that does."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            return layer
        return next(layer for layer in self.layers if isinstance(layer, CacheLayerMixin))

    def get_max_length(self, *args, **kwargs) -> int:
        """The most tokens kept: `window_length`."""
        return self.window_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, sizes: "torch.Tensor | int", layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys that `update` will return, and the column that the first of them counts as."""
        stored, length = self.get_seq_length(layer_idx), _query_length(sizes)
        if not self.is_bound:
            return (min(stored + length, self.window_length) if stored else length), 0
        layer = self._counting(layer_idx)
        if not isinstance(layer, SinkLayer):
            return layer.get_mask_sizes(sizes)
        num_keys = self.plan(stored, length).num_keys
        return num_keys, stored + length - num_keys

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was: int64 `[batch]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch, in that order: int64 `[new batch]`."""
        for ring in self._rings:
            ring.reorder(indices)
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.look()
                if isinstance(layer, StateLayer):
                    StateLayer.reorder_cache(layer, indices)
            else:
                layer.reorder_cache(indices)
        self._unbound.select_rows(indices)
        if self.latest_ids is not None:
            self.latest_ids = self.latest_ids.index_select(0, indices.to(self.latest_ids.device))
        if self.pads is not None and len(self.pads) > 1:
            rows = indices.tolist()
            self.pads, self.offsets = [self.pads[row] for row in rows], [self.offsets[row] for row in rows]
        self.step = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """The rows of the batch held, -1 if it holds nothing yet."""
        return next((keys.shape[0] for keys in self.key_cache if keys is not None and keys.numel() > 0), -1)

    def crop(self, max_length: int) -> None:
        """Forget the latest tokens, as long as none was evicted: what they evicted could not come back.

        Args:
            max_length: how many columns (tokens, padding included) to keep; if negative, how many to forget.

        Raises:
            ValueError: a token was evicted, or a row would be left without one, or the cache is not bound. Nothing is
                lost then.
        """
        seen = self.get_seq_length()
        kept = max_length if max_length >= 0 else seen + max_length
        if kept >= seen > 0:
            return
        pads = self.pads or [0]
        if not self.is_bound or not self._sinks_only or seen - min(pads) > self.window_length or any(self.offsets):
            raise ValueError(
                "A `SinkCache` can be cropped only if bound to a model with full attention in every layer, and before "
                f"its first eviction, got one with {seen} tokens seen and a window of {self.window_length}: what the "
                "cropped tokens evicted is gone."
            )
        if kept <= max(pads):
            raise ValueError(
                f"`max_length` must leave a token of each row, {max(pads) + 1} columns or more, got {max_length} of "
                f"{seen}. To forget all of them, `reset()` it."
            )
        for layer in self.layers:
            layer.seen = kept
        if self.latest_ids is not None and self.latest_end > kept:
            self.latest_ids, self.latest_end = self.latest_ids[:, : kept - self.latest_end], kept
        self.step = None

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write the conversation held to one safetensors file, from which `load` goes on in any process.

        Raises:
            ValueError: the cache is not bound, empty, or was left in the middle of a forward pass by an error.
            OSError: `path` can't be written.
        """
        if not self.is_bound or self.get_seq_length() == 0:
            raise ValueError("Only a bound `SinkCache` that holds tokens can be saved.")
        self._refuse_half_a_step()
        for ring in self._rings:  # as the model made them, which is all that there is to know
            ring.move_sinks([0])
        tensors = {"fingerprint": self._fingerprint}
        if self.latest_ids is not None:
            tensors["latest_ids"] = self.latest_ids
        for layer_idx, layer in enumerate(self.layers):
            tensors |= {f"{name}.{layer_idx}": tensor for name, tensor in _tensors(layer).items()}
        state = {name: getattr(self, name) for name in SAVED_STATE}
        state["seen"] = self.get_seq_length()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            safetensors.torch.save_file(tensors, path, metadata={"sink_cache": json.dumps(state)})
        except safetensors.SafetensorError as error:
            raise OSError(f"`path` can't be written, got {os.fspath(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: Union[str, os.PathLike], model: PreTrainedModel) -> "SinkCache":
        """The cache that `save` wrote to `path`, bound to `model`, which must be the one that it was bound to.

        Raises:
            ValueError: `path` is no such file, or of a conversation with another model.
            OSError: `path` can't be read.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                state = json.loads((file.metadata() or {})["sink_cache"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"`path` must be a file that `SinkCache.save` wrote, got {os.fspath(path)!r}.") from error
        cache = cls(state["window_length"], state["num_sink_tokens"]).bind(model)
        _refuse_other_model(cache._fingerprint, tensors["fingerprint"])
        cache.pads, cache.offsets, cache.latest_end = state["pads"], state["offsets"], state["latest_end"]
        cache.latest_ids = tensors.get("latest_ids")
        for layer_idx, layer in enumerate(cache.layers):
            held = {}
            for name, tensor in tensors.items():
                if name.rpartition(".")[2] == str(layer_idx):
                    held[name.rpartition(".")[0]] = tensor.to(_device(model))
            _hold(layer, held, state["seen"])
        return cache


def _refuse_other_model(fingerprint: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless the fingerprints are the same model's, in whatever dtype."""
    if fingerprint.shape != expected.shape or (fingerprint - expected).norm() > 0.1 * expected.norm():
        raise ValueError(
            "The `SinkCache` comes from a conversation with another model, whose keys and values mean nothing to this "
            "one. Use the model that it was held with."
        )


def _layers(model: PreTrainedModel, window_length: int, num_sink_tokens: int, reading: Reading) -> list:
    """A new layer for each of the model's: sinks and a window where it attends to all tokens, else what it has."""
    own = [] if _slides_everywhere(model) else _own_layers(model)
    layers, rings = [], {}
    for layer, rotation, slots in itertools.zip_longest(own, reading.rotations, reading.slots):
        if (rotation, slots) not in rings:
            rings[rotation, slots] = Ring(window_length, num_sink_tokens, rotation)
        ring = rings[rotation, slots]
        # A layer that caches nothing of text is for what comes beside it, as images.
        if type(layer).__name__ in KEPT_LAYERS or (layer is not None and not slots):
            layers.append(layer)
        elif isinstance(layer, StateLayer):
            layers.append(StateAndSinkLayer(layer.number_of_states, ring))
        else:
            layers.append(SinkLayer(ring))
    return layers


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    """All that a layer holds, by name."""
    tensors = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in ("conv_states", "recurrent_states"):
        tensors |= {f"{name}.{state_idx}": state for state_idx, state in getattr(layer, name, {}).items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _hold(layer: Any, tensors: dict[str, torch.Tensor], seen: int) -> None:
    """Make a new layer what it was when it held these `_tensors`."""
    if isinstance(layer, SinkLayer):
        SinkLayer.lazy_initialization(layer, tensors["keys"], tensors["values"])
        layer.keys.copy_(tensors["keys"])
        layer.values.copy_(tensors["values"])
        layer.seen = seen
    elif "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
        layer.cumulative_length = seen
    for name, tensor in tensors.items():
        kind, _, state_idx = name.partition(".")
        if kind == "conv_states":
            layer.update_conv_state(tensor, int(state_idx))
        elif kind == "recurrent_states":
            layer.update_recurrent_state(tensor, int(state_idx))


# What `SinkCache.save` writes of the cache, beside its layers.
SAVED_STATE = ("window_length", "num_sink_tokens", "pads", "offsets", "latest_end")


class UnboundLayers:
    """The keys and values of an unbound `SinkCache`: what the class of transformers<4.53 did, bit for bit.

    That includes its faults. It moves the window where a bound cache moves the sinks, at each step and in the keys' own
    dtype, so they wear out (huggingface/transformers #31581, #33691, #35350); it starts one step early, when the window
    is just full; and it places them in the window while `generate` gives the query its place in the whole sequence.
    """

    def __init__(self, window_length: int, num_sink_tokens: int):
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._cos: Optional[torch.Tensor] = None
        self._sin: Optional[torch.Tensor] = None
        self._back: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, cache_kwargs: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SinkCache.update`."""
        cos, sin = cache_kwargs.get("cos"), cache_kwargs.get("sin")
        if layer_idx == 0 and cos is not None and sin is not None:
            self._remember_angles(cos, sin)
        length = key_states.shape[-2]
        if layer_idx >= len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
            return key_states, value_states
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        total = keys.shape[-2] + length
        if total >= self.window_length:
            sinks = slice(0, self.num_sink_tokens)
            recent = slice(self.num_sink_tokens + length - self.window_length, None)
            recent_keys = keys[:, :, recent]
            if cos is not None and sin is not None:
                recent_keys = self._move_back(recent_keys, length, key_states.dtype, cache_kwargs)
            elif total > self.window_length:
                raise ValueError(
                    f"The `SinkCache` must evict ({total} tokens, `window_length` {self.window_length}) and was given "
                    "no `sin` and `cos` to move its keys with. Bind it to the model first: `cache.bind(model)`."
                )
            keys = torch.cat([keys[:, :, sinks], recent_keys], dim=-2)
            values = torch.cat([values[:, :, sinks], values[:, :, recent]], dim=-2)
        self.keys[layer_idx] = torch.cat([keys, key_states], dim=-2)
        self.values[layer_idx] = torch.cat([values, value_states], dim=-2)
        return self.keys[layer_idx], self.values[layer_idx]

    def _remember_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Collect cos and sin of the window's first positions, or take over a table of all of them (two dimensions)."""
        if cos.dim() == 2:
            self._cos, self._sin = cos, sin
        elif self._cos is None:
            self._cos, self._sin = cos[0], sin[0]
        elif self._cos.shape[0] < self.window_length:
            self._cos, self._sin = torch.cat([self._cos, cos[0]]), torch.cat([self._sin, sin[0]])

    def _move_back(self, keys: torch.Tensor, length: int, dtype: torch.dtype, cache_kwargs: dict) -> torch.Tensor:
        """Turn `keys` back by `length` positions."""
        if length not in self._back:
            cos, sin = self._cos[: self.window_length].float(), self._sin[: self.window_length].float()
            here, there = slice(self.num_sink_tokens + length, None), slice(self.num_sink_tokens, -length)
            self._back[length] = (
                (cos[here] * cos[there] + sin[here] * sin[there]).to(dtype)[None],
                (-sin[here] * cos[there] + cos[here] * sin[there]).to(dtype)[None],
            )
        cos, sin = self._back[length]
        rotary_dim = cache_kwargs.get("partial_rotation_size")
        turning, still = (keys, None) if rotary_dim is None else (keys[..., :rotary_dim], keys[..., rotary_dim:])
        half = turning.shape[-1] // 2
        swapped = torch.cat([-turning[..., half:], turning[..., :half]], dim=-1)
        turned = (turning * cos) + (swapped * sin)
        return turned if still is None else torch.cat([turned, still], dim=-1)

    def select_rows(self, index: torch.Tensor) -> None:
        """Make row `i` of the batch what row `index[i]` was."""
        self.keys = [keys.index_select(0, index.to(keys.device)) for keys in self.keys]
        self.values = [values.index_select(0, index.to(values.device)) for values in self.values]


# ---------------------------------------------------------------------------------------------------------------------
# What the model is given
# ---------------------------------------------------------------------------------------------------------------------

# Inputs with an entry for each token, and the dimension in which they have it.
PER_TOKEN_INPUTS = {"input_ids": 1, "inputs_embeds": 1, "token_type_ids": 1, "mm_token_type_ids": 1}
PER_TOKEN_INPUTS |= {"position_ids": -1, "cache_position": -1}

# What `generate` appends to at each step, beside its ids and the mask.
GROWING_INPUTS = ("position_ids", "token_type_ids", "mm_token_type_ids")


def _streaming(
    model: PreTrainedModel, cache: SinkCache, prefill_chunk_size: Optional[int], prefill_progress: bool
) -> PreTrainedModel:
    """A stand-in for `model` for the length of one call: it shares all of it and prepares its inputs for `cache`.

    Every decoding loop of transformers passes by `prepare_inputs_for_generation`. The stand-in has its own, so nothing
    is set on the model: calls from other threads can't meet this one's, and nothing has to be undone after an error.
    """
    stand_in = object.__new__(type(model))
    stand_in.__dict__.update(model.__dict__)
    # A model loaded from a repository that carries this file has `generate` below in its own place.
    stand_in.__dict__.pop("generate", None)
    stand_in.__dict__["_streamed"] = (model, cache)
    prepare_model, prepare = model._prepare_model_inputs, model.prepare_inputs_for_generation
    prepare_length, get_criteria = model._prepare_generated_length, model._get_stopping_criteria
    update, criteria = model._update_model_kwargs_for_generation, model._valid_auto_compile_criteria
    begun = compiled = False
    left_out, mask_given = 0, False  # columns of the conversation before the ids, and whether its mask came with them

    def prepare_model_inputs(inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> tuple:
        """As ever. It is the first that sees what the loop was given, by a `generate` of the model's own perhaps."""
        nonlocal begun, left_out, mask_given
        if model_kwargs.get("past_key_values") is cache:
            columns, left_out, start = _columns({"inputs": inputs} | model_kwargs)
            _refuse_other_columns(cache, columns, start)
            begun, mask_given = False, model_kwargs.get("attention_mask") is not None
        return prepare_model(inputs, bos_token_id, model_kwargs)

    @functools.wraps(prepare)  # transformers looks up the arguments that it takes
    def prepare_inputs_for_generation(input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
        nonlocal begun
        if kwargs.get("past_key_values") is not cache:  # a generation within this one, as token healing does
            return prepare(input_ids, *args, **kwargs)
        start, end = cache.get_seq_length(), left_out + input_ids.shape[1]
        prompt, begun = not begun, True
        cache.static = compiled and not prompt
        if prompt:
            _begin(cache, len(input_ids), _left_padding(kwargs.get("attention_mask"), mask_given))
            _refuse_other_conversation(cache, input_ids, end)
        elif kwargs.get("position_ids") is None:  # until 5.3, made of the mask that `update_model_kwargs` takes away
            kwargs["position_ids"] = _natural_positions(cache, 1).to(input_ids.device).expand(len(input_ids), -1)
        cache.latest_ids, cache.latest_end = input_ids, end
        _count_columns(kwargs, start, end, input_ids.device)
        inputs = prepare(input_ids, *args, **kwargs)
        # Some start over where their frequencies change, and 5.3 and later take new ids for new tokens all.
        if inputs.get("past_key_values") is not cache or _new_tokens(inputs).shape[1] > end - start:
            inputs = _cut(inputs, slice(start - end, None)) | {"past_key_values": cache}
        if not prompt:
            return _inputs_for_step(stand_in, cache, inputs)
        chunks = _chunks(cache, _new_tokens(inputs).shape[1], prefill_chunk_size)
        _refuse_media(inputs, chunks)
        _refuse_other_positions(cache, inputs.get("position_ids"))
        for chunk in transformers.logging.tqdm(chunks[:-1], desc="prompt", unit="chunk", disable=not prefill_progress):
            stand_in(**_inputs_for_step(stand_in, cache, _cut(inputs, chunk)), return_dict=True)
        return _inputs_for_step(stand_in, cache, _cut(inputs, chunks[-1]))

    def update_model_kwargs(*args, **kwargs) -> dict[str, Any]:
        """As ever, but what would grow with the stream is cut to the last token: the cache knows of those before."""
        kwargs = update(*args, **kwargs)
        if kwargs.get("past_key_values") is not cache:
            return kwargs
        kwargs.pop("attention_mask", None)
        growing = {name: kwargs[name] for name in GROWING_INPUTS if kwargs.get(name) is not None}
        return kwargs | {name: entries[..., -1:] for name, entries in growing.items()}

    def prepare_generated_length(generation_config: Any, input_ids_length: int, **kwargs) -> Any:
        """As ever, but 20 new tokens, where no number is named, end at no length that the model was trained on."""
        length = generation_config.max_length
        config = prepare_length(generation_config=generation_config, input_ids_length=input_ids_length, **kwargs)
        if kwargs["has_default_max_length"] and config.max_new_tokens is None and config.max_length > length:
            config.max_length = length + input_ids_length
        return config

    def get_stopping_criteria(*args, **kwargs) -> list:
        """As ever, without the warning that quality degrades past a length: the positions of a stream are bounded."""
        given, criteria = kwargs.get("stopping_criteria") or [], get_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, transformers.MaxLengthCriteria) and not any(criterion is its for its in given):
                criterion.max_position_embeddings = None
        return criteria

    def valid_auto_compile_criteria(model_kwargs: dict[str, Any], *args) -> bool:
        """As ever, for a cache that otherwise is offered to nobody for compilation: its steps are prepared here."""
        nonlocal compiled
        cache.is_compileable = _is_compileable(model, cache)
        try:
            valid = criteria(model_kwargs, *args)
        finally:
            cache.is_compileable = False
        compiled = valid and model_kwargs.get("past_key_values") is cache
        return valid

    def get_compiled_call(compile_config: Any) -> Callable:
        call = type(model).get_compiled_call(stand_in, compile_config)

        @functools.wraps(call)
        def compiled_call(**inputs) -> Any:
            outputs = call(**inputs)
            if inputs.get("past_key_values") is cache:
                cache.written()
            return outputs

        return compiled_call

    stand_in._prepare_model_inputs = prepare_model_inputs
    stand_in.prepare_inputs_for_generation = prepare_inputs_for_generation
    stand_in._update_model_kwargs_for_generation = update_model_kwargs
    stand_in._prepare_generated_length = prepare_generated_length
    stand_in._get_stopping_criteria = get_stopping_criteria
    stand_in._valid_auto_compile_criteria = valid_auto_compile_criteria
    stand_in.get_compiled_call = get_compiled_call
    return stand_in


def _is_compileable(model: PreTrainedModel, cache: SinkCache) -> bool:
    """Whether the model's code for one token can be compiled with this cache, as transformers does it by itself."""
    return COMPILES and cache._sinks_only and _takes_masks(model) and getattr(model, "_can_compile_fullgraph", True)


def _begin(cache: SinkCache, batch_size: int, pads: list[int]) -> None:
    """Take over a batch's padding if `cache` is empty; raise if it holds another batch, or other padding."""
    if cache.get_seq_length() == 0:
        cache.pads, cache.offsets, cache.step = pads, [0] * len(pads), None
    elif cache.batch_size != batch_size:
        raise ValueError(
            f"`past_key_values` holds a batch of {cache.batch_size}, got one of {batch_size} (beams and returned "
            "sequences count). Continue with as many, or `batch_repeat_interleave` it."
        )
    else:
        cache.pads = cache.pads or [0]  # the model was called by itself until now, which padded rows are kept from
        if cache.pads not in (pads, pads * batch_size):
            raise ValueError(
                f"`attention_mask` has {pads} columns of left padding, but the rows in `past_key_values` began after "
                f"{cache.pads}. Pass the conversation as it was, with its mask, and the new tokens after it."
            )


def _refuse_other_conversation(cache: SinkCache, input_ids: torch.Tensor, end: int) -> None:
    """Raise if `input_ids`, which end before column `end`, differ from what is known of the tokens seen."""
    if cache.latest_ids is None:
        return
    first, latest_first = end - input_ids.shape[1], cache.latest_end - cache.latest_ids.shape[1]
    start, stop = max(first, latest_first), min(cache.get_seq_length(), cache.latest_end)
    if start < stop and not torch.equal(
        input_ids[:, start - first : stop - first],
        cache.latest_ids[:, start - latest_first : stop - latest_first].to(input_ids.device),
    ):
        raise ValueError(
            "`input_ids` must continue the conversation in `past_key_values`, but are not the tokens that the "
            "`SinkCache` has seen. To start another one, `reset()` it."
        )


def _new_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """The ids, or embeddings, of the new tokens among the model's inputs: `[batch, length, ...]`."""
    return inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]


def _natural_positions(cache: SinkCache, length: int) -> torch.Tensor:
    """Which tokens of their rows the next `length` columns are, negative for padding: int64 `[rows, length]`."""
    start = cache.get_seq_length()
    return torch.arange(start, start + length, device="cpu") - torch.tensor(cache.pads, device="cpu")[:, None]


def _cut(inputs: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The same inputs for the new tokens `tokens` only."""
    cut = dict(inputs)
    for name, dim in PER_TOKEN_INPUTS.items():
        if isinstance(cut.get(name), torch.Tensor):
            cut[name] = cut[name][..., tokens] if dim == -1 else cut[name][:, tokens]
    return cut


def _chunks(cache: SinkCache, length: int, prefill_chunk_size: Optional[int]) -> list[slice]:
    """Cut `length` new tokens into updates: what fits into the window at once, the rest in chunks that evict little.

    A chunk evicts as many tokens as it has before any of its own attend, so its first token sees a window that is short
    by the rest of the chunk: by default at most a quarter.
    """
    room = cache.window_length - cache.num_sink_tokens
    chunk_size = min(prefill_chunk_size or max(room // 4, 1), room)
    if not cache._resumes:  # a model that forgets its states in between
        chunk_size = 1
    fits = cache.window_length - max(max(cache.get_seq_length() - pad, 0) for pad in cache.pads)
    chunks, start = [], 0
    while start < length:
        unevicted = fits - start if cache._resumes or cache.get_seq_length() + start == 0 else 0
        size = chunk_size if unevicted <= 0 else min(unevicted, prefill_chunk_size or unevicted)
        chunks.append(slice(start, min(start + size, length)))
        start += size
    return chunks


def _left_padding(attention_mask: Optional[torch.Tensor], given: bool = True) -> list[int]:
    """The columns of left padding of each row of `attention_mask` (`[batch, columns]`); one number if all agree.

    Not `given`, it is what transformers made of the pad tokens in the prompt.
    """
    if attention_mask is None:
        return [0]
    attended = attention_mask.bool()
    if attended.dim() != 2 or not attended[:, -1].all() or (attended[:, :-1] & ~attended[:, 1:]).any():
        if not given:
            raise ValueError(
                "`attention_mask` was not given, and `input_ids` have the pad token elsewhere than at the left, which "
                "transformers takes for padding. Pass `attention_mask=torch.ones_like(input_ids)` if it belongs to the "
                "text, and pad on the left if not."
            )
        raise ValueError(
            "`attention_mask` must be left padding only, `[batch, tokens]`: zeros, then ones up to the last token of "
            'each row. Set `padding_side="left"` on the tokenizer.'
        )
    pads = (~attended).sum(dim=-1).tolist()
    return pads[:1] if len(set(pads)) == 1 else pads


def _inputs_for_step(model: PreTrainedModel, cache: SinkCache, inputs: dict[str, Any]) -> dict[str, Any]:
    """Fit the model's inputs for one update to the cache: positions that stay bounded, a mask over the kept keys."""
    tokens = _new_tokens(inputs)
    batch_size, length = tokens.shape[:2]
    cache.bound_positions(length)
    step = cache.plan(cache.get_seq_length(), length)
    step.prepared = True
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _natural_positions(cache, length).clamp(min=0).to(tokens.device)
    if any(cache.offsets):
        positions = positions - torch.tensor(cache.offsets, device=positions.device)[:, None]
    inputs["position_ids"] = positions
    if cache.static:
        # Strides that depend on how many tokens there were would have the code compiled again.
        inputs["position_ids"] = positions.clone(memory_format=torch.contiguous_format)
        inputs["attention_mask"] = cache.point_slots(step, model.dtype, tokens.device)
    elif any(cache.pads) or step.evicts:
        inputs["attention_mask"] = None
        if step.needs_mask and not _takes_masks(model):
            raise ValueError(
                "`attention_mask` has padding, which needs a mask over the kept tokens that this model's "
                '`attn_implementation`, flash attention, does not take. Load the model with "sdpa".'
            )
        by_kind = any(cache.pads) and not cache._sinks_only
        # Given masks by kind a model makes none by itself, and before 4.54 it makes a wrong one.
        leaves_it = (by_kind and length > 1) or not MASKS_FOLLOW_THE_CACHE
        if step.needs_mask or (leaves_it and _takes_masks(model)):
            inputs["attention_mask"] = step.mask(model.dtype, tokens.device)
        if by_kind:
            columns = torch.arange(step.start + length, device=tokens.device)
            attended = columns >= torch.tensor(cache.pads, device=tokens.device)[:, None]
            attended = attended.expand(batch_size, -1)
            # As a mask of padding, which transformers leaves out where a token comes alone, padding or not.
            of_states = attended[:, -length:] if step.start < max(cache.pads) else None
            inputs["attention_mask"] = {
                "full_attention": inputs["attention_mask"],
                "hybrid": inputs["attention_mask"],
                "linear_attention": of_states,
                "conv": of_states,
                **{
                    kind: _own_mask(kind, model, cache, attended, length)
                    for kind in {"sliding_attention", "chunked_attention"}.intersection(_kinds(model.config))
                },
            }
    return inputs


def _takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes a mask over keys, which flash attention doesn't."""
    return "flash" not in str(model.config.get_text_config(decoder=True)._attn_implementation)


def _refuse_media(inputs: dict[str, Any], chunks: list[slice]) -> None:
    """Raise if a prompt has images or the like and goes in by chunks, or the model finds positions for them later."""
    text = (*PER_TOKEN_INPUTS, "attention_mask")
    media = [name for name, value in inputs.items() if name not in text and isinstance(value, (torch.Tensor, dict))]
    if not any(inputs[name] is not None and len(inputs[name]) > 0 for name in media):
        return
    if len(chunks) > 1:
        raise ValueError(
            f"Images or the like ({', '.join(media)}) must come with a prompt that goes in at once: this one goes in "
            f"{len(chunks)} chunks, the first of {chunks[0].stop} tokens. Pass a shorter prompt, or a greater "
            "`window_length`."
        )
    if inputs.get("position_ids") is None:
        raise ValueError(
            f"Images or the like ({', '.join(media)}) can't be streamed with this model: it chooses their positions "
            "where a stream can't see them. Pass a prompt of text."
        )


def _refuse_other_positions(cache: SinkCache, positions: Optional[torch.Tensor]) -> None:
    """Raise if the model's `positions` (`[..., rows, length]`) of a prompt go on otherwise than by one each token."""
    if positions is None or positions.shape[-1] == 1:  # a single token is not looked at: that waits for the device
        return
    natural = _natural_positions(cache, positions.shape[-1])
    if ((positions.cpu() != natural) & (natural >= 0)).any():
        raise ValueError(
            "`model` gives the prompt positions other than 0, 1, 2, ... (as those of images in two dimensions), and a "
            "stream moves its sinks by as many as there are tokens. Pass a prompt of text."
        )


# ---------------------------------------------------------------------------------------------------------------------
# generate
# ---------------------------------------------------------------------------------------------------------------------


# The arguments of `generate` that may be positional by hand, in order.
OWN_ARGUMENTS = ("model", "window_length", "num_sink_tokens", "prefill_progress")


def generate(
    *args,
    model: Optional[PreTrainedModel] = None,
    window_length: Optional[int] = None,
    num_sink_tokens: Optional[int] = None,
    prefill_progress: bool = False,
    **kwargs,
) -> Any:
    """Generate without end in constant memory: `model.generate` with a `SinkCache`.

    By hand it is called as `generate(model, window_length, num_sink_tokens, prefill_progress, **kwargs)`. A model that
    was loaded from a repository with this file has it as its own `generate`, which takes the prompt first, as ever.

    As with a `StaticCache`, transformers compiles the model's forward pass for single tokens on a GPU, and elsewhere if
    `compile_config` says so: one graph for any stream. Not with layers that are no sink layers, flash attention, or a
    model that can't be one graph; and not with `disable_compile`.

    Args:
        args: `model` and those after it, by hand; where `model` is given by name, what its class's `generate` takes.
        model: a decoder-only model whose attention is relative (RoPE, in some layers at least, or recurrent states),
            also in a wrapper of `torch.compile` or peft.
        window_length (`int`, defaults to that of the generation config, or 256): the most tokens kept in the cache,
            sinks included.
        num_sink_tokens (`int`, defaults to that of the generation config, or 4): how many of them are the first tokens
            of the sequence.
        prefill_progress (`bool`, defaults to `False`): show a progress bar while a long prompt goes in.
        kwargs: all that `model.generate` takes. Of special meaning:
            past_key_values (`SinkCache`): continue in this cache, in its window unless another is named, which is an
                error. The conversation so far comes again as `input_ids`, or its new tokens only with the
                `attention_mask` of all. A new, unbound cache is bound to `model`.
            prefill_chunk_size (`int`): the most tokens of a prompt in one forward pass. Chunks of one token evict
                exactly as decoding does. By default a prompt goes in at once as far as the window holds it, and what is
                beyond in chunks of a quarter of the window: their first tokens see that much less of it.

    Returns:
        What `model.generate` returns. With `return_dict_in_generate=True`, its `past_key_values` is the `SinkCache`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument, or the model, can't be served correctly. Both come before any forward pass of the
            generation, and leave what was passed as it was.
    """
    if args:
        own = (model, window_length, num_sink_tokens, prefill_progress)
        return generate(**_named(args, dict(zip(OWN_ARGUMENTS, own)) | kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name not in ABOUT_THE_CALL}
    model = _unwrapped(model)
    loop = _generate_behind(model)
    _refuse_arguments(model, kwargs)
    stand_in, (model, streamed) = model, vars(model).get("_streamed", (model, None))
    chunk_size = _setting(model, kwargs, "prefill_chunk_size")
    chunk_size = None if chunk_size is None else operator.index(chunk_size)
    # Settings that are served here, or that a model's files ask for and `past_key_values` replaces.
    kwargs.pop("prefill_chunk_size", None)
    served = {"prefill_chunk_size": None, "cache_implementation": None, "use_cache": True, "return_legacy_cache": None}
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = _with(kwargs["generation_config"], **served)
    if streamed is not None and kwargs.get("past_key_values") is streamed:
        return loop.__get__(stand_in)(**kwargs)  # an override that asks for a stream by itself, called by hand
    window = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    cache = kwargs.pop("past_key_values", None)
    if cache is None:
        settings = {name: _setting(model, window | kwargs, name) for name in window}
        cache = SinkCache(**{name: value for name, value in settings.items() if value is not None})
    else:
        _refuse_cache(cache, window)
    if loop.__module__.startswith("transformers.generation"):  # else nobody knows yet what it will be given
        columns, _, start = _columns(kwargs)
        _refuse_other_columns(cache, columns, start)
    cache.bind(model)
    stand_in, seen = _streaming(model, cache, chunk_size, prefill_progress), cache.get_seq_length()
    stand_in.generation_config = _with(model.generation_config, **served)
    try:
        output = loop.__get__(stand_in)(past_key_values=cache, **kwargs)
        if cache.get_seq_length() == seen:
            raise ValueError(
                f"`model` ({type(model).__name__}) has a `generate` of its own that did not hand `past_key_values` on "
                "to that of transformers, so nothing was streamed. Have it pass on the arguments that it doesn't know."
            )
        return output
    finally:
        cache.static, cache._slots_mask = False, None
        vars(stand_in).clear()  # it and the functions set on it hold each other, and the cache
        if cache.latest_ids is not None:  # enough to know the conversation by, and no more than the window
            cache.latest_ids = cache.latest_ids[:, -cache.window_length :].clone()


def _generate_behind(model: PreTrainedModel) -> Callable:
    """The `generate` among those of the model's class and its bases that a stream goes on in, not yet bound.

    A class may have a `generate` of its own, which ends in that of the class behind it, and at last in transformers'.
    It has begun if `custom_generate`, or it itself, led here: then what is behind it follows. By hand, and where this
    file came with the model, it is yet to run. One set on the model alone is left out there: it may hold the model.
    """
    bases = type(model).__mro__
    bases = bases[: bases.index(transformers.GenerationMixin) + 1]  # whose `generate` calls nothing behind it
    classes = [cls for cls in bases if "generate" in vars(cls)]
    codes = [getattr(inspect.unwrap(vars(cls)["generate"]), "__code__", None) for cls in classes]
    caller = frame = inspect.currentframe().f_back.f_back  # of `generate`
    frames = []
    # A loop that has got further than to call this calls it for another generation, as of a logits processor.
    while frame is not None and (frame is caller or frame.f_code is not codes[-1]):
        frames.append(frame)
        frame = frame.f_back
    begun = 0
    for frame in reversed(frames):
        if frame.f_code in codes[begun:] and _first_argument(frame) is model:
            begun = codes.index(frame.f_code, begun) + 1
    if begun == len(classes):  # transformers' own, which calls functions for `custom_generate` under its decorators
        return inspect.unwrap(vars(classes[-1])["generate"])
    return vars(classes[begun])["generate"]


def _first_argument(frame: Any) -> Any:
    """What the function of the frame was called with first."""
    names = frame.f_code.co_varnames
    value = frame.f_locals.get(names[0]) if names else None
    return value[0] if isinstance(value, tuple) and value else value


def _named(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of a call of `generate`, and its positional `args` by their names.

    Raises:
        TypeError: there are too many, or one of them also stands in `kwargs`; or transformers calls `generate` as the
            decoding loop of one of its own.
    """
    if kwargs["model"] is not None:
        names = _positional_names(type(_unwrapped(kwargs["model"])))
    elif len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].dim() > 0:
        raise TypeError(
            "`custom_generate` must be the name or the folder of this repository, not its function `generate`: "
            "transformers takes a function for a decoding loop, and hands it a prompt and a cache already made. Call "
            "the function by hand with the prompt by name, `generate(model, window_length, input_ids=...)`."
        )
    else:
        names = OWN_ARGUMENTS
    if len(args) > len(names):
        raise TypeError(f"`generate` takes {len(names)} arguments by position ({', '.join(names)}), got {len(args)}.")
    named = dict(zip(names, args))
    for name in named:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise TypeError(f"`{name}` was given twice, by position and by name. Leave one of them out.")
    return kwargs | named


def _positional_names(model_class: type) -> list[str]:
    """The arguments that `generate` of the class takes by position; transformers' own if it doesn't name them."""
    for function in (model_class.generate, transformers.GenerationMixin.generate):
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            break
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]


def _unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers that `model` is, or that `torch.compile` or peft put their wrapper around.

    Raises:
        TypeError: there is none, or none that generates.
        ValueError: peft would put learned tokens or keys before the prompt.
    """
    inner = getattr(model, "_orig_mod", model)
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers `PreTrainedModel`, got {type(model).__name__}.")
    if not isinstance(inner, transformers.GenerationMixin):
        raise TypeError(
            f"`model` must be one that generates, got {type(inner).__name__}, which has no `generate` of transformers. "
            "Load the model with its language modeling head."
        )
    # While such a peft model generates, the model inside prepares its inputs by a method of the wrapper.
    for wrapper in (model, getattr(inner.prepare_inputs_for_generation, "__self__", None)):
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"`model` ({type(wrapper).__name__}) can't be streamed: its adapter puts what it learned before the "
                "prompt, where a stream counts no tokens. Use another kind of adapter, as LoRA."
            )
    return inner


def _with(config: Any, **settings) -> Any:
    """`config`, or where that changes it a copy, with these attributes."""
    if any(getattr(config, name, None) != value for name, value in settings.items()):
        config = copy.deepcopy(config)
        for name, value in settings.items():
            setattr(config, name, value)
    return config


def _setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """The value that `generate` will use: an argument wins over `generation_config`, and that over the model's."""
    values = (
        kwargs.get(name),
        getattr(kwargs.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    )
    return next((value for value in values if value is not None), None)


def _asked_for(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """What a call asks for of the cache, by an argument or a configuration; None if that is what the model's files say.

    Files say such things without a stream in mind: training with gradient checkpointing leaves `use_cache: false`.
    """
    if kwargs.get(name) is not None:
        return kwargs[name]
    asked = getattr(kwargs.get("generation_config"), name, None)
    files = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    return None if asked in [getattr(config, name, None) for config in files] else asked


def _refuse_arguments(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that a stream can't serve."""
    if _asked_for(model, kwargs, "use_cache") is False:
        raise ValueError("`use_cache` must not be False: streaming is what the cache does. Pass `use_cache=True`.")
    implementation = _asked_for(model, kwargs, "cache_implementation")
    if implementation is not None:
        raise ValueError(
            f"`cache_implementation` must not be given, got {implementation!r}: the cache is a `SinkCache`. Leave it "
            "out."
        )
    if _asked_for(model, kwargs, "return_legacy_cache"):
        raise ValueError(
            "`return_legacy_cache` must not be True: a tuple of keys and values is no `SinkCache`. Leave it out."
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha"):
        if _setting(model, kwargs, name):
            raise ValueError(
                f"`{name}` asks for a decoding mode that takes tokens back, which a `SinkCache` can't: the tokens that "
                "they evicted are gone. Leave it out."
            )
    for name, mode in MOVED_MODES.items():
        value = _setting(model, kwargs, name)
        if value is not None and value != 1:  # as one group of beams
            raise ValueError(
                f"`{name}` asks for {mode}, which transformers {transformers.__version__} loads from a repository of "
                "its own, and a stream is another. Leave it out."
            )
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "`position_ids` must not be given: a stream chooses positions that stay bounded. Leave it out."
        )
    chunk_size = _setting(model, kwargs, "prefill_chunk_size")
    try:
        valid = chunk_size is None or _integer("prefill_chunk_size", chunk_size) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"`prefill_chunk_size` must be an int of at least 1, got {chunk_size!r}.")


def _columns(kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """How many columns the conversation has that a call of `generate` goes on from; how many of them its ids leave out,
    and how many its ids and embeddings do.

    Raises:
        ValueError: there is a prompt without a token.
    """
    names = ("inputs", "input_ids", "inputs_embeds")
    given = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), torch.Tensor)}
    if given and not any(tensor.numel() for tensor in given.values()):
        name, tensor = next(iter(given.items()))
        raise ValueError(
            f"`{name}` must have a token of each row to go on from, got {list(tensor.shape)}. Begin with the "
            "tokenizer's `bos_token_id` where there is no text yet."
        )
    ids = kwargs.get("inputs") if kwargs.get("input_ids") is None else kwargs["input_ids"]
    given, embedded, masked = (
        0 if tensor is None else tensor.shape[1]
        for tensor in (ids, kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
    )
    columns = max(given, embedded, masked)
    return columns, columns - given, columns - max(given, embedded)


def _refuse_other_columns(cache: SinkCache, columns: int, start: int) -> None:
    """Raise unless what is given of a conversation, its `columns` from `start` on, goes on where `cache` has got to."""
    seen = cache.get_seq_length()
    if 0 < columns <= seen:
        raise ValueError(
            f"`input_ids` must be the whole conversation, longer than the {seen} tokens that the `SinkCache` in "
            f"`past_key_values` has seen, got {columns}; or only what is new, with the `attention_mask` of all. "
            "Don't crop it to `get_max_cache_shape()`. To start another one, `reset()` it."
        )
    if seen < start < columns:
        raise ValueError(
            f"`input_ids` must go on after the {seen} tokens that the `SinkCache` has seen, but are the last "
            f"{columns - start} of the {columns} in `attention_mask`: {start - seen} are missing. The last token that "
            "was generated has not been seen, so pass it too."
        )


def _refuse_model(model: PreTrainedModel, window_length: int) -> None:
    """Raise for models, and windows on a model, that can't be streamed."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` ({name}) is an encoder-decoder, and only a decoder-only model can be streamed.")
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"`model` ({name}) can't be streamed while it trains with gradient checkpointing, as that leaves any cache "
            "empty: call `model.eval()` first."
        )
    if not model._supports_default_dynamic_cache():
        raise ValueError(
            f"`model` ({name}) can't be streamed: transformers {transformers.__version__} gives it a cache of its own, "
            "which a `SinkCache` can't stand in for. Use a model with full attention in its layers."
        )
    _refuse_layers(model)
    if _slides_everywhere(model) and window_length > config.sliding_window:
        raise ValueError(
            f"`window_length` must be at most {config.sliding_window}, got {window_length}: the model's own attention "
            "reaches no further back, so the sinks would be out of its sight."
        )
    trained_length = _trained_length(config)
    changing = {settings.get("rope_type", settings.get("type")) for settings in _rope_parameters(config)}
    if changing & {"dynamic", "longrope"} and trained_length and window_length > trained_length:
        raise ValueError(
            f"`window_length` must be at most {trained_length}, got {window_length}: past that the model changes the "
            "frequencies of its rotary embeddings, and the keys in the cache would no longer fit."
        )


def _kinds(config: Any) -> list[str]:
    """The kind of each layer, as far as the configuration names it."""
    return list(getattr(config.get_text_config(decoder=True), "layer_types", None) or [])


def _slides_everywhere(model: PreTrainedModel) -> bool:
    """Whether all layers attend to their own `sliding_window` latest tokens: a cache no longer than that rules them."""
    config, kinds = model.config.get_text_config(decoder=True), set(_kinds(model.config))
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return slides and kinds <= {"sliding_attention"}


def _refuse_layers(model: PreTrainedModel) -> None:
    """Raise unless some layers of the model attend to all tokens, and the others can stay as they are."""
    config = model.config.get_text_config(decoder=True)
    kinds, hybrid = set(_kinds(config)), getattr(config, HYBRID, None)
    if _slides_everywhere(model) and not hybrid:
        return
    try:
        own = _own_layers(model)
    except Exception as error:
        raise ValueError(
            f"`model` ({type(model).__name__}) can't be streamed: transformers {transformers.__version__} can't make a "
            f"cache for it: {error}"
        ) from error
    classes = {type(layer).__name__ for layer in own}
    unknown = ", ".join(sorted(classes - {*FULL_LAYERS, *KEPT_LAYERS}))
    if hybrid or (CACHED_KINDS is not None and kinds - CACHED_KINDS):
        named = ", ".join(sorted(kinds)) or "full and sliding attention"
        reason = f"transformers {transformers.__version__} can't cache its kinds of layers ({named}) each in its way"
    elif unknown:
        reason = f"its layers cache more than keys and values ({unknown})"
    elif own and not classes & set(FULL_LAYERS):
        reason = "none of its layers attends to all tokens, so it takes constant memory without a `SinkCache`"
    elif own and len(own) < config.num_hidden_layers:
        reason = f"its last {config.num_hidden_layers - len(own)} layers read the keys of others out of the cache"
    else:
        return
    raise ValueError(
        f"`model` ({type(model).__name__}) can't be streamed: {reason}. Use a model with full attention in its layers."
    )


def _refuse_cache(past_key_values: Any, window: dict[str, Optional[int]]) -> None:
    """Raise unless `past_key_values` is a `SinkCache` in good order, and with the window that was named."""
    # By name: the same file loaded from the Hub and from a folder is two modules, with a class each.
    if not any(cls.__name__ == "SinkCache" and hasattr(cls, "bind") for cls in type(past_key_values).__mro__):
        raise TypeError(
            f"`past_key_values` must be this repository's `SinkCache`, got {type(past_key_values).__module__}."
            f"{type(past_key_values).__name__}. Leave it out to start a new one."
        )
    for name, value in window.items():
        if value is not None and value != getattr(past_key_values, name):
            raise ValueError(
                f"`{name}` is {value}, but the `SinkCache` in `past_key_values` was made with "
                f"{getattr(past_key_values, name)}. Leave `{name}` out, or use a new cache."
            )
    past_key_values._refuse_half_a_step()
