"""Endless generation in constant memory: attention sinks (arXiv:2309.17453) for decoder-only transformers models.

The cache keeps the first `num_sink_tokens` tokens of a sequence and its latest `window_length - num_sink_tokens`.
From top to bottom: what differs between releases of transformers; how a model turns its keys with their position
(`Rotation`); which tokens are kept (`Window`), and what one update keeps, writes and sees (`UpdatePlan`); where equal
layers keep them (`Ring`), and what one layer does with them (`SinkLayer`); all layers, bound to a model (`SinkCache`)
or driven by hand (`UnboundLayers`); the file of a conversation; what the model is given for a step (`_streaming`); and
`generate`, which ties them together.

Shapes: `rows` is the batch, or 1 where all its sequences agree; `pairs` are the pairs of dimensions that RoPE turns.
"""

import contextlib
import copy
import errno
import functools
import inspect
import itertools
import json
import math
import operator
import os
import shutil
import stat
import sys
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import safetensors
import safetensors.torch
import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__version__ = "1.0.0"

_logger = transformers.logging.get_logger(__name__)

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

# What `Cache.crop` calls its argument: how many tokens stay ("max_length") or, in newer releases, minus how many go.
CROP_ARGUMENT = list(inspect.signature(DynamicCache.crop).parameters)[1]

# 5.0 itself leaves out this argument in early exits, which therefore fail.
EARLY_EXITS_FAIL = "is_first_iteration" in inspect.signature(AssistedCandidateGenerator.get_candidates).parameters

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


def _own_mask(
    kind: str, model: PreTrainedModel, cache: Cache, attended: Optional[torch.Tensor], plan: Any, tokens: torch.Tensor
) -> Any:
    """The mask that transformers makes for layers of a kind for the new `tokens` (`[batch, length, ...]`) of a `plan`.

    `attended` is where columns are tokens and no padding, bool `[batch, columns]`, None if there is no padding.
    """
    make = transformers.masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    arguments = inspect.signature(make).parameters
    states = torch.empty(len(tokens), plan.length, 0, dtype=cache._mask_dtype, device=tokens.device)
    kwargs = {"input_embeds" if "input_embeds" in arguments else "inputs_embeds": states}  # renamed in 5.0
    if "cache_position" in arguments:  # until 5.3
        kwargs["cache_position"] = torch.arange(
            plan.start, plan.start + plan.length, dtype=torch.long, device=tokens.device
        )
    config = model.config.get_text_config(decoder=True)
    return make(config=config, attention_mask=attended, past_key_values=cache, **kwargs)


def _count_columns(kwargs: dict[str, Any], start: int, end: int, device: torch.device) -> None:
    """Set right which columns come next: until 5.3 `generate` counts them, wrongly where it gets new tokens only."""
    if "cache_position" in kwargs:
        kwargs["cache_position"] = torch.arange(start, end, dtype=torch.long, device=device)


def _is_synced(model: PreTrainedModel, synced_gpus: Optional[bool]) -> bool:
    """Whether `generate` will keep the ranks of a distributed model in step, by the rule that it has itself."""
    if synced_gpus is not None:
        return bool(synced_gpus)
    utils, distributed = transformers.generation.utils, torch.distributed
    sharded = utils.is_deepspeed_zero3_enabled() or utils.is_fsdp_managed_module(model)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return sharded and several


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

    def turned(self, pairs: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """`pairs` (float32 `[..., pairs, 2]`) turned by `distances`, a number of positions for each vector of pairs.

        The angle is taken in float64: in float32 its own rounding would be felt after some ten thousand positions.

        Args:
            pairs: of `Rotation.pairs`, in float32.
            distances: float64 on the CPU, in a shape that broadcasts to the dimensions of `pairs` before the last two.
        """
        angles = distances[..., None] * self.frequencies
        turns = torch.polar(torch.ones_like(angles), angles).to(pairs.device, torch.complex64)
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)

    def turn(self, keys: torch.Tensor, distances: list[int]) -> torch.Tensor:
        """Turn each row of `keys` (`[rows, kv_heads, seq, head_dim]`) where it is: one rounding to their dtype."""
        pairs = self.pairs(keys)
        pairs.copy_(self.turned(pairs.float(), _each_row(distances)))
        return keys


def _each_row(distances: list[int]) -> torch.Tensor:
    """How far each row of keys turns: float64 `[rows, 1, 1]`, which broadcasts to heads and tokens."""
    return torch.tensor(distances, dtype=torch.float64, device="cpu")[:, None, None]


@dataclass(frozen=True, eq=False)
class Reading:
    """What was found out about a model by running it on a few tokens.

    Args:
        stamp: what all this rests on, as `_stamp` told it then.
        rotations: how each layer turns its keys, None for one whose keys have no position.
        slots: shape, dtype and device of what each layer caches of text, alike in equal layers, empty if it is nothing.
        fingerprint: what the model is known by: its last keys for some tokens, float32 `[4, kv_heads, 1, head_dim]`.
        resumes: whether it goes on from a layer's state where it gets several tokens at once.
        counts: whether it counts positions on where it is given none.
        rounding: the relative rounding of what its attention gets.
        reach: up to which position all this was tried.
    """

    stamp: tuple[list[weakref.ref], list]
    rotations: list[Optional[Rotation]]
    slots: list[tuple]
    fingerprint: torch.Tensor
    resumes: bool
    counts: bool
    rounding: float
    reach: int


USE_ROPE = "Use a model with rotary position embeddings (RoPE)."

_readings: "weakref.WeakKeyDictionary[PreTrainedModel, Reading]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def read_model(model: PreTrainedModel) -> Reading:
    """Find how each layer of `model` turns its keys, and what else a stream has to know.

    The model is run on single tokens, once at position 0 and once `distance` positions later. A token alone attends to
    itself whatever its position, so with relative positions the runs differ in the rotation of the keys and in nothing
    else. Each layer gets the rotation, among those that the model's own tensors suggest, that turns the first run's
    keys into the second's. Some more runs of a few tokens tell whether all that the model does is relative, and how it
    keeps its states, if it does. The result is remembered for as long as the model lives, and what it rests on stays.

    Raises:
        ValueError: `model` takes no `position_ids`, or makes nothing of them; no rotation explains its keys (learned
            positions); what it gives is no number; or what it does depends on where tokens are in the cache, or on
            positions themselves, as far as its dtype shows it.
    """
    if model in _readings and _is_stamped(model, _readings[model].stamp):
        return _readings[model]
    parameters = inspect.signature(model.forward).parameters
    names_positions = "position_ids" in parameters
    no_positions = _unreadable(
        model,
        "its forward takes no `position_ids`, or makes nothing of them, and a stream must choose them to keep them "
        f"bounded. {USE_ROPE}",
    )
    # A wrapped forward may hand on whatever it gets: whether it does is tried below.
    if not names_positions and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise no_positions
    # Far enough that scaled frequencies, which differ in the slow pairs only, are told apart.
    distance = min(_trained_length(model.config) or 1024, 1024) - 1
    try:
        before, after = _cached_at(model, 0), _cached_at(model, distance)
        rounding = max(torch.finfo(dtype).eps for dtype in _dtypes(model, before))
        moved, allowed = _difference_when_moved(model, distance, rounding)
    except Exception as error:
        raise _unreadable(
            model,
            f"it failed on a few tokens at positions 0 and {distance}, off which its rotation is read: {error}",
        ) from error
    _refuse_no_numbers(model, before, moved)
    candidates = functools.cache(lambda head_dim, tensor: list(_candidates(model, head_dim, tensor)))
    rotations = []
    for layer_idx, (first, second) in enumerate(zip(before, after)):
        explanations = [
            _explain(first[tensor].cpu(), second[tensor].cpu(), distance, candidates(first[tensor].shape[-1], tensor))
            for tensor in first
        ]
        tolerance = 4 * (rounding + distance * torch.finfo(torch.float32).eps)
        turning = [rotation for _, rotation in explanations if rotation is not None]
        left = max((error for error, _ in explanations), default=0.0)
        if len(turning) > 1 or left > tolerance:
            raise _unreadable(
                model,
                f"the keys of its layer {layer_idx} change with their position, but not by a rotation, so they can't "
                f"be moved as tokens are evicted. From position 0 to {distance} the nearest rotation, of frequencies "
                f"that stand in the model, leaves {left:.2g} of their length unexplained (rounding: {tolerance:.2g}).",
            )
        rotations.append(turning[0] if turning else None)
    if not any(rotations) and not (any(before) and _keeps_states(model) and _attends_to_a_set(model, rounding)):
        raise (
            no_positions
            if not names_positions
            else _unreadable(
                model,
                "no layer turns its keys with their position, so the model knows the order of tokens, if it does, from "
                f"their places in the cache (as by ALiBi or relative biases), which a stream changes. {USE_ROPE}",
            )
        )
    if moved > allowed:
        raise _not_relative(model, distance, moved, allowed)
    slots = [tuple((states.shape, states.dtype, states.device) for states in layer.values()) for layer in before]
    resumes, counts = _resumes(model, rounding), _counts(model, rounding)
    _readings[model] = Reading(
        _stamp(model), rotations, slots, _fingerprint(before), resumes, counts, rounding, distance
    )
    return _readings[model]


def _stamp(model: PreTrainedModel) -> tuple[list[weakref.ref], list]:
    """What a reading of `model` rests on, told without running it.

    Returns:
        References to its modules and weights, the same ones as long as none was exchanged; and values: versions and
        places of the weights, the modules' code and plain settings (training and active adapters among them),
        the configuration, and what may be frequencies. Not seen are weights changed behind torch's back (`.data`),
        which no rotation depends on.
    """
    references, values = [], [repr(model.config.to_dict())]
    for module in model.modules():
        weights = [weight for weight in module._parameters.values() if weight is not None]
        # Those that accelerate keeps elsewhere until they are needed come and go.
        references += map(weakref.ref, [module, *(weight for weight in weights if weight.device.type != "meta")])
        values += [(weight.dtype, weight.shape, weight.device) for weight in weights]
        values += [weight._version for weight in weights if not weight.is_inference()]
        frequencies = [frequencies.tolist() for frequencies in _frequencies_in(module)]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()] if frequencies else []
        values += [id(code) for code in (vars(module).get("forward"), type(module).forward, *hooks)]
        values += [frequencies, {name: value for name, value in vars(module).items() if type(value) in PLAIN}]
    return references, values


PLAIN = (bool, int, float, str)


def _is_stamped(model: PreTrainedModel, stamp: tuple[list[weakref.ref], list]) -> bool:
    """Whether that is still the `stamp` of `model`."""
    references, values = _stamp(model)
    same = len(references) == len(stamp[0]) and all(map(operator.is_, references, stamp[0]))
    return same and values == stamp[1]


def _fingerprint(cached: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What a model is known by, off what it `cached` of four tokens: its last keys, float32 `[4, kv_heads, 1, dim]`."""
    return [layer for layer in cached if layer][-1]["keys"].float().cpu()


@torch.no_grad()
def _fingerprint_now(model: PreTrainedModel) -> torch.Tensor:
    """The fingerprint of the model as it is, whatever was read of it."""
    return _fingerprint(_cached_at(_unwrapped(model), 0))


@torch.no_grad()
def _refuse_reach(model: PreTrainedModel, reading: Reading, window_length: int, reach: int) -> None:
    """Raise unless `model` does up to position `reach` what was read off it, and remember that it does.

    Raises:
        ValueError: it fails there, turns its keys otherwise, or what its tokens see of each other changes.
    """
    if reach <= reading.reach:
        return
    trained_length = _trained_length(model.config)
    named = trained_length is not None and trained_length < window_length
    limit = f"`window_length` must be at most {trained_length}, got {window_length}. " if named else ""
    try:
        before, after = _cached_at(model, 0), _cached_at(model, reach)
        moved, allowed = _difference_when_moved(model, reach, reading.rounding)
    except Exception as error:
        raise _unreadable(model, f"it failed on a few tokens at position {reach}: {error}", limit) from error
    tolerance = 4 * (reading.rounding + reach * torch.finfo(torch.float32).eps)
    for layer_idx, rotation in enumerate(reading.rotations):
        for tensor, states in before[layer_idx].items():
            turns = [rotation] if rotation is not None and rotation.tensor == tensor else []
            left, found = _explain(states.cpu(), after[layer_idx][tensor].cpu(), reach, turns)
            if left > tolerance or (turns and found is None and states.any()):
                raise _unreadable(
                    model,
                    f"at position {reach} the keys of its layer {layer_idx} are turned otherwise than up to "
                    f"{reading.reach}, so keys of both don't fit together.",
                    limit,
                )
    if not moved <= allowed:
        raise _not_relative(model, reach, moved, allowed, limit)
    _readings[model] = replace(reading, reach=reach, stamp=_stamp(model))


def _unreadable(model: PreTrainedModel, reason: str, limit: str = "") -> ValueError:
    """The error for a model that what it did on a few tokens speaks against, after the `limit` that would avoid it."""
    training = " It is in training mode, where dropout changes what it does: call `model.eval()` first."
    return ValueError(
        f"{limit}`model` ({type(model).__name__}) can't be streamed: {reason}{training if model.training else ''}"
    )


def _refuse_no_numbers(model: PreTrainedModel, cached: list[dict[str, torch.Tensor]], moved: float) -> None:
    """Raise if what a model `cached` of a few tokens, or how far what it gave `moved`, is NaN or infinite."""
    seen = [
        f"the keys and values of its layer {layer_idx}"
        for layer_idx, layer in enumerate(cached)
        if not all(states.isfinite().all() for states in layer.values())
    ]
    if seen or math.isnan(moved):
        raise _unreadable(
            model,
            f"{(seen or ['its logits'])[0]} are NaN or infinite for a few tokens, off which its rotation is read. Look "
            "at its weights, or load it in a wider dtype.",
        )


def _not_relative(model: PreTrainedModel, distance: int, moved: float, allowed: float, limit: str = "") -> ValueError:
    """The error for a model that gives something else where tokens are `distance` further on; `limit` as above."""
    reason = (
        "what its tokens see of each other changes when all move by the same distance, and a stream moves them to keep "
        f"positions bounded. What four tokens give at positions up to {distance} differs by {moved:.2g} of its length "
        f"from what they give at the first positions (rounding: {allowed:.2g})."
    )
    if any("nn.quantized.dynamic" in type(module).__module__ for module in model.modules()):
        reason += (
            " It has dynamically quantized layers, which round by all that they are given at once: quantize the "
            "weights only."
        )
    return _unreadable(model, reason, limit)


def _cached_at(model: PreTrainedModel, position: int) -> list[dict[str, torch.Tensor]]:
    """What each layer caches for four single tokens at `position`: `[4, kv_heads, 1, head_dim]` each."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Spread over the vocabulary, so that no odd token (padding is often embedded as zero) decides alone.
    tokens = [[vocabulary * part // 8] for part in (1, 3, 5, 7)]
    tokens = torch.tensor(tokens, dtype=torch.long, device=_device(model))
    cache = _own_cache(model.config)
    model(input_ids=tokens, position_ids=torch.full_like(tokens, position), past_key_values=cache, use_cache=True)
    return _cached(cache)


def _some_tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Four rows of `length` tokens, int64."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(4 * length, dtype=torch.long, device=_device(model)).view(4, length) % vocabulary


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model gets its tokens: on the CPU if accelerate keeps its weights elsewhere until they are needed."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _dtypes(model: PreTrainedModel, cached: list[dict[str, torch.Tensor]]) -> set[torch.dtype]:
    """What attention is computed in: sines and cosines have the embedded tokens' dtype, whatever that of the keys."""
    embedded = model.get_input_embeddings()(_some_tokens(model, 1))
    return {model.dtype, embedded.dtype, *(states.dtype for layer in cached for states in layer.values())}


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The relative difference of the row that differs least: rounding may send a token to another expert in some."""
    expected, actual = expected.float().flatten(1), actual.float().flatten(1)
    norms = expected.norm(dim=-1)
    if not norms.any():
        return float(actual.norm())
    return float(((expected - actual).norm(dim=-1) / norms)[norms != 0].min())


def _difference_when_moved(model: PreTrainedModel, distance: int, rounding: float) -> tuple[float, float]:
    """How much what four tokens give differs up to position `distance` from position 0 on, and by how much it may.

    Both are relative to the length of what they give. Nothing is tried if `distance` is below 4.
    """
    if distance < 4:
        return 0.0, 0.0
    here, one_on, there = (_logits_at(model, start) for start in (0, 1, distance - 3))
    if not here.any():
        here, one_on, there = (_logits_at(model, start, before_head=True) for start in (0, 1, distance - 3))
    noise = _difference(here, one_on)  # there, everything is rounded anew
    return _difference(here, there), 4 * (noise + distance * torch.finfo(torch.float32).eps + rounding)


def _logits_at(model: PreTrainedModel, start: int, before_head: bool = False) -> torch.Tensor:
    """What four rows of four tokens give from position `start` on: logits, 0 where ruled out, or the last states."""
    tokens = _some_tokens(model, 4)
    output = model(
        input_ids=tokens,
        position_ids=torch.arange(start, start + 4, dtype=torch.long, device=tokens.device).expand(4, 4),
        past_key_values=_own_cache(model.config),  # without, positions above 0 would make it look for several texts
        use_cache=True,
        **({"output_hidden_states": True} if before_head else {}),
    )
    if before_head:
        return output.hidden_states[-1]
    return output.logits.masked_fill(output.logits.abs() >= torch.finfo(output.logits.dtype).max, 0)


def _attends_to_a_set(model: PreTrainedModel, rounding: float) -> bool:
    """Whether a token gives the same when the 16 before it lie in the cache in reverse order."""
    tokens = _some_tokens(model, 17)
    positions = torch.arange(17, dtype=torch.long, device=tokens.device).expand(4, -1)
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
    return _difference(*logits) <= max(1e-5, 4 * rounding)


def _keeps_states(model: PreTrainedModel) -> bool:
    """Whether a layer of the model keeps a recurrent state."""
    return any(isinstance(layer, StateLayer) for layer in _own_layers(model))


def _resumes(model: PreTrainedModel, rounding: float) -> bool:
    """Whether two tokens after seven leave the states of the model's layers as nine at once do."""
    if not _keeps_states(model):
        return True
    tokens = _some_tokens(model, 9)
    positions = torch.arange(9, dtype=torch.long, device=tokens.device).expand(4, -1)
    whole, parts = _own_cache(model.config), _own_cache(model.config)
    for cache, part in ((whole, slice(0, 9)), (parts, slice(0, 7)), (parts, slice(7, 9))):
        model(input_ids=tokens[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True)
    # What a layer makes of it shows in the next one at the latest, and further on there is more noise.
    states = [layer_idx for layer_idx, layer in enumerate(whole.layers) if isinstance(layer, StateLayer)]
    noise = max(1e-4, 4 * rounding)
    return all(
        float((tensor.float() - there[name].float()).norm()) <= noise * float(tensor.float().norm())
        for here, there in zip(map(_tensors, whole.layers[: states[:2][-1] + 1]), map(_tensors, parts.layers))
        for name, tensor in here.items()
    )


def _counts(model: PreTrainedModel, rounding: float) -> bool:
    """Whether a second token gets position 1 where the model, which keeps states, is given none."""
    if not _keeps_states(model):
        return True
    tokens, keys = _some_tokens(model, 2), []
    for positions in ({}, {"position_ids": torch.ones_like(tokens[:, 1:])}):
        cache = _own_cache(model.config)
        model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
        model(input_ids=tokens[:, 1:], past_key_values=cache, use_cache=True, **positions)
        keys.append([layer["keys"] for layer in _cached(cache) if layer][-1])
    return _difference(*keys) <= 4 * rounding


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
        yield from _frequencies_in(module)


def _frequencies_in(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Those of one module, without its children."""
    for tensor in [*module._buffers.values(), *vars(module).values()]:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dim() == 1:
            yield tensor.detach().to("cpu", torch.float64)
        elif tensor.dim() == 2 and min(tensor.shape) > 1 and tensor.shape[1] % 2 == 0:
            first, second = tensor[1].detach().to("cpu", torch.float64).chunk(2)
            if torch.allclose(first**2 + second**2, torch.ones_like(first), atol=1e-2):
                yield from (torch.atan2(first, second), torch.atan2(second, first))


def _turn_alike(rotations: list[Optional[Rotation]], others: list[Optional[Rotation]]) -> bool:
    """Whether layers turn their keys alike, but for a cast that rounded their frequencies."""
    return len(rotations) == len(others) and all(
        (one is other)
        or (
            one is not None
            and other is not None
            and (one.start, one.interleaved, one.tensor) == (other.start, other.interleaved, other.tensor)
            and one.frequencies.shape == other.frequencies.shape
            and torch.allclose(one.frequencies, other.frequencies, rtol=2**-8, atol=1e-6)
        )
        for one, other in zip(rotations, others)
    )


def _explain(
    before: torch.Tensor, after: torch.Tensor, distance: int, candidates: list[Rotation]
) -> tuple[float, Optional[Rotation]]:
    """How far `before` is from `after` (`[batch, kv_heads, 1, head_dim]`) by the nearest rotation, or none; and which.

    Returns:
        The norm of the difference that it leaves, as a part of that of `after`; and the rotation. Zeros don't turn.
    """
    before, after = before.float(), after.float()

    def error(rotation: Optional[Rotation]) -> float:
        turned = rotation.turn(before.clone(), [distance]) if rotation else before
        return float((turned - after).norm() / after.norm().clamp(min=torch.finfo(torch.float32).tiny))

    best = min([None, *candidates], key=error)
    return error(best), best


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
# What one update keeps, writes and sees
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Which tokens of a row are kept, and in which slots.

    Token `t` sees the first `num_sinks` tokens (the sinks) and the last `recent` tokens up to and including itself. The
    sinks keep their slots; the others share a ring, in which a token takes the place of the oldest:

        length = 8, num_sinks = 2      sinks   ring (recent = 6)
        slots                          0  1    2  3  4  5  6  7
        after token 7                  0  1    2  3  4  5  6  7
        after token 10                 0  1    8  9 10  5  6  7

    Args:
        length: the most tokens kept, sinks included (`window_length`).
        num_sinks: how many of them are the first of the row (`num_sink_tokens`).
    """

    length: int
    num_sinks: int

    @property
    def recent(self) -> int:
        """How many of the latest tokens are kept behind the sinks."""
        return self.length - self.num_sinks

    def slot(self, token: int) -> int:
        """The slot of token number `token` of a row."""
        return token if token < self.num_sinks else self.num_sinks + (token - self.num_sinks) % self.recent

    def slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """The slots of `tokens` (int64, any shape), and some slot for a negative number, which is no token."""
        in_ring = self.num_sinks + (tokens - self.num_sinks) % self.recent
        return torch.where((tokens >= 0) & (tokens < self.num_sinks), tokens, in_ring)


class UpdatePlan:
    """What one update keeps, writes and sees: the same for every layer.

    Tokens of a row are counted without its left padding, so column `c` is token `c - pad`. RoPE sees only differences
    of positions. So the window's keys stay as the model made them, and the sinks move instead: for token `t` they sit
    directly before the oldest of its recent tokens, `t - window.length + 1` positions from where the model put them
    (arXiv:2309.17453, section 3.2).

    - *One token* takes the slot of the token that leaves the window, and sees all slots with the sinks moved for it.
    - *Several tokens of which none is evicted* see the kept ones and, causally, each other.
    - *Several tokens that evict* (`sees_copies`) need the sinks in several places. Each new column gets a copy of them,
      moved for it. The keys are `[copies, length * num_sinks | recent tokens, num_recent | new tokens, length]`, and a
      mask gives each column its own copy and its own recent tokens. So each logit is that of tokens sent one by one.

    Args:
        window: which tokens are kept.
        start: columns (tokens, padding included) seen before this update.
        length: columns of this update.
        pads: each row's columns of left padding.
        offsets: by how much each row's positions are kept below its token counts.

    Attributes:
        seen, num_new: of each row, the tokens seen before this update and the new ones.
        sink_shifts: by how many positions each row's sinks are moved in their slots during this update.
        first_slots: the slot of each row's first new token.
        num_keys: how many keys the new tokens are given.
    """

    def __init__(self, window: Window, start: int, length: int, pads: list[int], offsets: list[int]):
        self.window, self.start, self.length, self.pads, self.offsets = window, start, length, pads, offsets
        self.seen = [max(start - pad, 0) for pad in pads]
        self.num_new = [min(length, max(start + length - pad, 0)) for pad in pads]
        self.evicts = any(seen + new > window.length for seen, new in zip(self.seen, self.num_new))
        self.sees_copies = self.evicts and length > 1
        self.num_recent = min(max(max(self.seen) - window.num_sinks, 0), window.recent)
        if self.sees_copies:
            self.sink_shifts = [0] * len(pads)  # they are copied from where the model made them
            self.num_keys = length * window.num_sinks + self.num_recent + length
        else:
            self.sink_shifts = [max(seen - window.length + 1, 0) - offset for seen, offset in zip(self.seen, offsets)]
            self.num_keys = min(max(self.seen) + 1, window.length) if length == 1 else max(self.seen) + length
        self.first_slots = [window.slot(seen) for seen in self.seen]
        # Of one token, rows that fill the window are alike again.
        kept = [min(seen, window.length - 1) for seen in self.seen] if length == 1 else self.seen
        self.needs_mask = self.sees_copies or min(kept) < max(kept) or min(self.num_new) < length
        self.prepared = False  # whether the model was given positions and a mask made for this update
        self._on_device: dict[torch.device, tuple] = {}

    def tokens(self, first: int, device: torch.device) -> torch.Tensor:
        """The tokens that columns `start + first` to the last are, negative for padding: int64 `[rows, columns]`."""
        columns = torch.arange(self.start + first, self.start + self.length, dtype=torch.long, device=device)
        return columns - torch.tensor(self.pads, dtype=torch.long, device=device)[:, None]

    @functools.cached_property
    def copy_shifts(self) -> torch.Tensor:
        """By how many positions the sinks are moved for each new column: float64 `[rows, length]` on the CPU."""
        moved = (self.tokens(0, torch.device("cpu")) - self.window.length + 1).clamp(min=0)
        return (moved - torch.tensor(self.offsets, dtype=torch.long, device="cpu")[:, None]).double()

    def on_device(self, device: torch.device) -> tuple:
        """What the layers index by, made once for each device.

        Returns:
            `recent_slots` (int64 `[rows, num_recent]`: the slots of the recent tokens, in order, some slot where a row
            has fewer), and `rows`, `columns`, `slots`: the new tokens `[rows, :, columns]` that are kept go to
            `[rows, :, slots]`.
        """
        if device not in self._on_device and self.length == 1:  # the common case, without what several tokens need
            rows = [row for row, new in enumerate(self.num_new) if new]
            slots = [self.first_slots[row] for row in rows]
            indices = (
                torch.tensor(each, dtype=torch.long, device=device) for each in ([], rows, [0] * len(rows), slots)
            )
            self._on_device[device] = tuple(indices)
        elif device not in self._on_device:
            recent = self.tokens(-self.num_recent, torch.device("cpu"))[:, : self.num_recent]
            tokens = self.tokens(0, torch.device("cpu"))
            end = tokens[:, -1:] + 1
            kept = (tokens >= 0) & ((tokens < self.window.num_sinks) | (tokens >= end - self.window.recent))
            rows, columns = kept.nonzero(as_tuple=True)
            slots = self.window.slots(tokens[rows, columns])
            moved = [each.to(device) for each in (self.window.slots(recent), rows, columns, slots)]
            if len(self.pads) == 1:  # and any number of rows in the batch
                moved[1] = slice(None)
            self._on_device[device] = tuple(moved)
        return self._on_device[device]

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask over the keys that `SinkLayer.update` returns: `[rows, 1, length, num_keys]`."""
        new = self.tokens(0, device)[:, :, None]  # [rows, length, 1]
        if self.length == 1:
            sees = torch.arange(self.num_keys, dtype=torch.long, device=device) <= new
        elif not self.sees_copies:  # the keys are tokens 0, 1, ..., filled up where a row has fewer, and the new ones
            seen = torch.tensor(self.seen, dtype=torch.long, device=device)[:, None, None]
            old = torch.arange(max(self.seen), dtype=torch.long, device=device) < seen
            causal = (new.mT <= new) & (new.mT >= 0)
            sees = torch.cat([old.expand(-1, self.length, -1), causal], dim=-1)
        else:
            copy = torch.arange(self.length, dtype=torch.long, device=device).repeat_interleave(self.window.num_sinks)
            sink = torch.arange(self.window.num_sinks, dtype=torch.long, device=device).repeat(self.length)
            own = (copy == torch.arange(self.length, dtype=torch.long, device=device)[:, None]) & (sink <= new)
            token = self.tokens(-self.num_recent, device)[:, None]  # [rows, 1, num_recent + length]
            recent = (token >= self.window.num_sinks) & (token <= new) & (token > new - self.window.recent)
            sees = torch.cat([own, recent], dim=-1)
        return _additive(sees[:, None], dtype)


def _additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that attention adds to its scores, from whether a key is seen. Finite, so that padding gives no NaN."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)


# ---------------------------------------------------------------------------------------------------------------------
# The slots, and one layer's keys and values
# ---------------------------------------------------------------------------------------------------------------------


class Ring:
    """The slots of equal layers, in one piece of memory: their sinks move together, once a step.

    RoPE sees only differences of positions, so moving the window back as tokens leave it is the same as moving the
    sinks forward: the window's keys stay as the model made them, and the few sinks are turned anew at each step, always
    from what the model made.

    Args:
        window: which tokens are kept, and in which slots.
        rotation: how these layers turn their keys; None if they don't.

    Attributes:
        keys, values: `[layers, batch, kv_heads, window.length, head_dim]`.
        rows, slots: where compiled code writes each row's token: int64 `[batch]`.
    """

    def __init__(self, window: Window, rotation: Optional[Rotation]):
        self.window, self.rotation = window, rotation
        self.num_layers = 0
        self.keys = self.values = None
        # What turns of the sinks as the model made it, once that in the slots was moved:
        self.sinks: Optional[torch.Tensor] = None  # float32 `[layers, batch, kv_heads, sinks, pairs, 2]`
        # How far the sinks in the slots were moved, each row's; None while they are being moved.
        self.shifts: list[Optional[int]] = [0]

    @torch.inference_mode(False)
    def allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for keys and values like these, `[batch, kv_heads, seq, head_dim]`."""
        keys, values = (
            states.new_zeros(self.num_layers, *states.shape[:2], self.window.length, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.hold(keys, values)
        if self.rotation is not None:
            shape = self._turning(slice(0, self.window.num_sinks)).shape
            self.sinks = torch.zeros(shape, dtype=torch.float32, device=keys.device)

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over `keys` and `values`."""
        self.keys, self.values = keys, values
        self.rows = torch.arange(keys.shape[1], dtype=torch.long, device=keys.device)
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

    def place_sinks(self, shifts: list[int]) -> None:
        """Put each row's sinks so far from where the model did, if they are not there."""
        moves = shifts != self.shifts and (any(shifts) or any(shift != 0 for shift in self.shifts))
        if not moves or self.rotation is None or self.window.num_sinks == 0:
            return
        in_slots = self._turning(slice(0, self.window.num_sinks))
        if 0 in self.shifts:  # those of some rows have not moved yet
            unmoved = torch.tensor([shift == 0 for shift in self.shifts], dtype=torch.bool, device=in_slots.device)
            self.sinks.copy_(torch.where(unmoved[:, None, None, None, None], in_slots.float(), self.sinks))
        self.shifts = [None] * len(shifts)  # an interrupt finds what the model made in `sinks`
        in_slots.copy_(self.rotation.turned(self.sinks, _each_row(shifts)))
        self.shifts = shifts

    def lower_positions(self, distances: list[int]) -> None:
        """Lower the positions of the window's keys by `distances`, each row's; the sinks follow at the next update."""
        if self.rotation is not None and self.keys is not None:
            by = _each_row([-distance for distance in distances])
            for window in self._turning(slice(self.window.num_sinks, None)):  # by layers: less memory in between
                window.copy_(self.rotation.turned(window.float(), by))

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


@dataclass(frozen=True, eq=False)
class Evicted:
    """What a layer needs to take its latest tokens back: the tokens that they evicted.

    Args:
        end: the column after the latest token.
        columns: how many columns can be taken back.
        keys, values: `[batch, kv_heads, evicted, head_dim]`, the latest last, or None: of what a single token evicts
            nothing is needed again, as the token after it never sees it.
    """

    end: int
    columns: int
    keys: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Evicted":
        """The same with other keys and values."""
        if self.keys is None:
            return self
        return replace(self, keys=function(self.keys), values=function(self.values))


class SinkLayer(CacheLayerMixin):
    """The sinks and the window of one attention layer, which it keeps in a `Ring` with its equals.

    `keys` and `values` are `[batch, kv_heads, window.length, head_dim]`, by slots.
    """

    is_sliding = False
    keys = values = None

    def __init__(self, ring: Ring):
        super().__init__()
        self.ring, self.index = ring, ring.num_layers
        ring.num_layers += 1
        self.seen = 0  # columns
        self.evicted = Evicted(end=0, columns=0)
        self.record_past = False  # whether what is evicted is kept until `take_back`, by several updates too
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
        self.ring, self.index = Ring(old.window, old.rotation), 0
        self.ring.keys, self.ring.values, self.ring.shifts = old.keys[part], old.values[part], old.shifts
        self.ring.sinks = None if old.sinks is None else old.sinks[part]
        return self.ring

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, plan: UpdatePlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in `plan.length` new tokens, `[batch, kv_heads, length, head_dim]`; return what they attend to.

        Returns:
            Keys and values, `[batch, kv_heads, plan.num_keys, head_dim]`: a view of the slots for one token; for
            several, the kept tokens and then the new ones, after the copies of the sinks if there are some.
        """
        key_states, value_states = key_states.detach(), value_states.detach()  # slots outlive any autograd graph
        if not self.is_initialized or not _alike(self, key_states, value_states):
            SinkLayer.lazy_initialization(self, key_states, value_states)
        self.ring.place_sinks(plan.sink_shifts)
        if plan.length == 1:
            self._write(key_states, value_states, plan, self._evicted_by_one(plan))
            return self.keys[:, :, : plan.num_keys], self.values[:, :, : plan.num_keys]
        if plan.sees_copies:
            slots = plan.on_device(key_states.device)[0]
            kept_keys, kept_values = (_gather(buffer, slots) for buffer in (self.keys, self.values))
        else:
            kept_keys, kept_values = (buffer[:, :, : max(plan.seen)] for buffer in (self.keys, self.values))
        keys, values = torch.cat([kept_keys, key_states], dim=2), torch.cat([kept_values, value_states], dim=2)
        evicted = Evicted(plan.start + plan.length, plan.length)
        gone = slice(keys.shape[2] - self.ring.window.recent)
        if plan.sees_copies and gone.stop > 0:  # of the recent tokens and the new ones, the last `recent` stay
            evicted = replace(evicted, keys=keys[:, :, gone].clone(), values=values[:, :, gone].clone())
        self._write(key_states, value_states, plan, self._recorded(evicted))
        if plan.sees_copies and self.ring.window.num_sinks > 0:
            key_copies, value_copies = self._sink_copies(plan)
            keys, values = torch.cat([key_copies, keys], dim=2), torch.cat([value_copies, values], dim=2)
        return keys, values

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor, plan: UpdatePlan, evicted: Evicted) -> None:
        """Put new tokens into their slots. Cut short at any point, `evicted` tells what was begun."""
        self.evicted = evicted
        if plan.length == 1 and plan.num_new == [1]:  # plain decoding: a view is faster than an index
            slot = slice(plan.first_slots[0], plan.first_slots[0] + 1)
            self.keys[:, :, slot], self.values[:, :, slot] = key_states, value_states
        else:
            _, rows, columns, slots = plan.on_device(key_states.device)
            self.keys[rows, :, slots] = key_states[rows, :, columns]
            self.values[rows, :, slots] = value_states[rows, :, columns]
        self.seen = plan.start + plan.length

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` with one token, in tensors alone: each row's goes into `ring.slots`; all slots are returned."""
        self.keys[self.ring.rows, :, self.ring.slots] = key_states[:, :, 0]
        self.values[self.ring.rows, :, self.ring.slots] = value_states[:, :, 0]
        return self.keys, self.values

    def count_written(self) -> None:
        """Count the token that `write` put into its slot."""
        self.evicted, self.seen = Evicted(self.seen + 1, 1), self.seen + 1

    def _sink_copies(self, plan: UpdatePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the sinks, moved for each new column: `[batch, kv_heads, length * num_sinks, head_dim]`."""
        num_sinks, rotation = self.ring.window.num_sinks, self.ring.rotation
        copies = {
            name: buffer[:, :, None, :num_sinks].repeat(1, 1, plan.length, 1, 1)  # [.., length, num_sinks, head_dim]
            for name, buffer in (("keys", self.keys), ("values", self.values))
        }
        if rotation is not None:
            turning = rotation.pairs(copies[rotation.tensor])
            turning.copy_(rotation.turned(turning.float(), plan.copy_shifts[:, None, :, None]))
        return copies["keys"].flatten(2, 3), copies["values"].flatten(2, 3)

    def _evicted_by_one(self, plan: UpdatePlan) -> Evicted:
        """What one new token evicts; its key and value only if several such tokens may be taken back."""
        evicted = Evicted(plan.start + 1, 1)
        if not self.record_past:
            return evicted
        if plan.evicts:
            slots = self.ring.window.slots(plan.tokens(0, self.keys.device))
            evicted = Evicted(plan.start + 1, 1, _gather(self.keys, slots), _gather(self.values, slots))
        return self._recorded(evicted)

    def _recorded(self, evicted: Evicted) -> Evicted:
        """`evicted`, after what was evicted before since the tokens were last settled; at most as much as is kept."""
        before = self.evicted
        if not self.record_past or before.columns == 0 or before.end != self.seen:
            return evicted
        columns = before.columns + evicted.columns
        if before.keys is None or evicted.keys is None:
            latest = evicted if before.keys is None else before
            return replace(latest, end=evicted.end, columns=columns)
        most = max(self.ring.window.recent, evicted.keys.shape[2])
        keys, values = torch.cat([before.keys, evicted.keys], 2), torch.cat([before.values, evicted.values], 2)
        return Evicted(evicted.end, min(columns, most), keys[:, :, -most:], values[:, :, -most:])

    @property
    def begun(self) -> int:
        """Columns seen, and those whose update was cut short."""
        return max(self.seen, self.evicted.end)

    def take_back(self, end: int, pads: list[int]) -> None:
        """Forget all columns from `end` on, also if they were not all written, and put back what they evicted.

        Args:
            end: the column after the last one that stays, at most `evicted.columns` before the latest, or anywhere as
                long as nothing was evicted.
            pads: each row's columns of left padding.
        """
        latest, keys, values = self.begun, self.evicted.keys, self.evicted.values
        columns = latest - end
        if keys is not None:
            window, number = self.ring.window, keys.shape[2]
            first = max(number - columns, 0)
            padding = torch.tensor(pads, dtype=torch.long, device="cpu")[:, None]
            tokens = torch.arange(first - number, 0, dtype=torch.long, device="cpu") + latest - window.recent - padding
            rows, places = ((tokens >= window.num_sinks) & (tokens < end - padding)).nonzero(as_tuple=True)
            slots = window.slots(tokens[rows, places]).to(keys.device)
            rows = slice(None) if len(pads) == 1 else rows.to(keys.device)
            places = (places + first).to(keys.device)
            self.keys[rows, :, slots] = keys[rows, :, places].to(self.keys)
            self.values[rows, :, slots] = values[rows, :, places].to(self.values)
            keys, values = (keys[:, :, :first], values[:, :, :first]) if first > 0 else (None, None)
        self.seen = end
        # While the past is recorded, what is left after this is settled.
        left = 0 if self.record_past else max(self.evicted.columns - columns, 0)
        self.evicted = Evicted(end, left, keys, values) if left else Evicted(end, 0)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """The most tokens kept."""
        return self.ring.window.length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, sizes: "torch.Tensor | int") -> tuple[int, int]:
        """How many keys an update returns for so many new tokens, without padding, and the column of the first."""
        length = _query_length(sizes)
        num_keys = UpdatePlan(self.ring.window, self.seen, length, [0], [0]).num_keys
        return num_keys, self.seen + length - num_keys


def _can_record(layer: Any) -> bool:
    """Whether a layer can take tokens back after they evicted others, if it is told to record."""
    return type(layer) is SinkLayer or (hasattr(layer, "record_past") and not isinstance(layer, StateLayer))


def _gather(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What `buffer`, `[batch, kv_heads, window.length, head_dim]`, has in `slots` (`[rows, n]`) of each row."""
    if len(slots) == 1:  # copies whole tokens: several times as fast
        return buffer.index_select(2, slots[0])
    batch, heads, _, head_dim = buffer.shape
    return buffer.gather(2, slots[:, None, :, None].expand(batch, heads, -1, head_dim))


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


class Call:
    """A call of `generate`, in the thread that makes it: a cache is in use by one at a time."""

    def __init__(self):
        self.thread = threading.get_ident()


_claiming = threading.Lock()  # held while a call takes a cache into use


class _WithoutGraph(torch.autograd.Function):
    """Copies of `keys` and `values` off the slots, which know nothing of the graph of the states that went in."""

    @staticmethod
    def forward(ctx, keys: torch.Tensor, values: torch.Tensor, *states: torch.Tensor) -> tuple:
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> None:
        raise ValueError(
            "`backward` can't go through a bound `SinkCache`, which keeps no graph of its keys and values. Call the "
            "model with a `DynamicCache`, or without `past_key_values`, where gradients are needed."
        )


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
    trained on. Refused are a batch that must evict, several tokens at once that evict, steps past that length, and
    going on with rows that were padded or shifted back. What the cache can't see there, and is wrong: one row that is
    padded, and `position_ids` other than the model's own.

    What the cache holds after some tokens, and every logit, depends on these tokens alone: not on how they were cut
    into forward passes, what else is in the batch, or whether other tokens were taken back in between (`crop`).

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
        if window_length > sys.maxsize:
            raise ValueError(f"`window_length` must be at most {sys.maxsize}, got {window_length}.")
        if not 0 <= num_sink_tokens < window_length:
            raise ValueError(
                f"`num_sink_tokens` must be at least 0 and less than `window_length` ({window_length}), which counts "
                f"the sinks too, got {num_sink_tokens}."
            )
        _init_cache(self)
        self._window = Window(window_length, num_sink_tokens)
        self._model: Optional[_ModelReference] = None
        self._fingerprint: Optional[torch.Tensor] = None  # of that model
        self._rotations: list[Optional[Rotation]] = []
        self._resumes = self._counts = True
        self._new_layers: list = []  # what `layers` are before the first token
        self._call: Optional[Call] = None  # the one that this cache is in use by
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_other_thread()  # of which a copy would have half a step
        return vars(self) | {"_call": None}

    def _take_into_use(self, call: Call) -> None:
        """Keep this cache for `call` alone until `_give_back`; raise if it is in use."""
        with _claiming:
            if self._call is None:
                self._call = call
        if self._call is not call:
            self._refuse_use()

    def _give_back(self, call: Call) -> None:
        """The end of `call`: if it was this that the cache was in use by, it is free again."""
        if self._call is call:
            self._call = None

    def _refuse_other_thread(self) -> None:
        """Raise if a call of `generate` has this cache in use, in another thread than this one."""
        if torch.compiler.is_compiling():  # in a call's own thread, and compiled code can't ask for it
            return
        call = self._call
        if call is not None and call.thread != threading.get_ident():
            self._refuse_use()

    def _refuse_use(self) -> None:
        raise ValueError(
            "The `SinkCache` in `past_key_values` is in use by another call of `generate`, which goes on. Wait until "
            "that has ended, or use a cache for each call."
        )

    def reset(self) -> None:
        """Forget all tokens; a bound cache stays bound."""
        self._refuse_other_thread()
        self.layers = copy.deepcopy(self._new_layers)
        self.static = False  # whether compiled code writes the next token
        self._slots_mask: Optional[torch.Tensor] = None
        self.pads: Optional[list[int]] = None  # each row's left padding, None as long as no mask was seen
        self.offsets = [0]  # by how much each row's positions are lowered
        self.has_evicted = False  # since when only what was kept of evicted tokens can be put back
        self._plan: Optional[UpdatePlan] = None
        self.latest_ids: Optional[torch.Tensor] = None  # the last tokens that `generate` was passed
        self.latest_end = 0  # the column after them
        self._unbound = UnboundLayers(self.window_length, self.num_sink_tokens)

    def bind(self, model: PreTrainedModel) -> "SinkCache":
        """Read the rotation of every layer off `model` and stream from now on.

        Args:
            model: a decoder-only model with relative positions. It is run on a few tokens, once as long as it stays as
                it is, and nothing is changed on it; the cache does not keep it alive.

        Returns:
            This cache.

        Raises:
            ValueError: the cache is bound to another model, one whose keys and values are others; it holds tokens that
                it took in unbound, or whose keys `model` has since come to turn otherwise; or `model` can't be
                streamed.
        """
        model = _unwrapped(model)
        self._refuse_other_thread()
        if not self.is_bound and self.get_seq_length() > 0:
            raise ValueError(
                f"The `SinkCache` in `past_key_values` was not bound when it took in its {self.get_seq_length()} "
                "tokens. Call `bind(model)` before the first token, or `reset()` it."
            )
        bound_to = None if self._model is None else self._model()
        if bound_to is not model:
            _refuse_model(model, self.window_length)
        device = model.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            reading = read_model(model)
        if bound_to is model and reading.rotations is self._rotations:
            return self
        slots = [(shape, dtype) for layer in reading.slots for shape, dtype, _ in layer]
        nbytes = self.window_length * sum(shape[1] * shape[3] * dtype.itemsize for shape, dtype in slots)
        if nbytes > sys.maxsize:
            raise ValueError(
                f"`window_length` is {self.window_length}, for which keys and values would take {nbytes} bytes, more "
                "than a machine can address. Choose a shorter one."
            )
        layers = _layers(model, self._window, reading)
        # Far enough above the window that shifting back is rare, and above those of layers that slide by themselves, so
        # that no key meets it twice; low enough that float32 is exact about angles.
        reaches = [getattr(layer, "sliding_window", 0) for layer in layers]
        ceiling = max(4 * self.window_length, 4096, *reaches)
        trained_length = _trained_length(model.config) or ceiling
        ceiling = max(self.window_length, min(ceiling, trained_length))
        _refuse_reach(model, reading, self.window_length, ceiling - 1)
        if self.is_bound and bound_to is not model and not _are_alike(reading.fingerprint, self._fingerprint):
            raise ValueError(
                OTHER_MODEL
                if bound_to is None
                else "The `SinkCache` in `past_key_values` is bound to another model, whose keys and values mean "
                "nothing to this one. Use a `SinkCache` for each model."
            )
        if self.get_seq_length() > 0 and not _turn_alike(reading.rotations, self._rotations):
            raise ValueError(
                f"`model` turns its keys otherwise than for the {self.get_seq_length()} tokens that the `SinkCache` in "
                "`past_key_values` holds, with which new ones would not fit together: its rotary embeddings are "
                "others. `reset()` it, or use a new one."
            )
        self._rotations, self._new_layers = reading.rotations, layers
        if self.get_seq_length() == 0:
            self.layers = copy.deepcopy(layers)
        for layer, rotation in zip(self.layers, reading.rotations):
            if isinstance(layer, SinkLayer):
                layer.ring.rotation = rotation
        # Queries may be wider than the first parameter, whose dtype is the model's. Narrower ones take a wider mask.
        dtypes = [dtype for layer in reading.slots for _, dtype, _ in layer]
        self._mask_dtype = functools.reduce(torch.promote_types, dtypes, model.dtype)
        self._fingerprint, self._resumes, self._counts = reading.fingerprint, reading.resumes, reading.counts
        self._trained_length, self._ceiling = trained_length, ceiling
        self._model = _ModelReference(model)
        return self

    def _keep_layers(self, number: int) -> None:
        """Hold the first `number` layers only, for a model that exits early; before the first token."""
        reading = read_model(self._model())
        self._rotations = reading.rotations[:number]
        reading = replace(reading, rotations=self._rotations, slots=reading.slots[:number])
        self._new_layers = _layers(self._model(), self._window, reading)
        self.reset()

    @property
    def window_length(self) -> int:
        """The most tokens kept, sinks included."""
        return self._window.length

    @property
    def num_sink_tokens(self) -> int:
        """How many of the tokens kept are the first of the sequence."""
        return self._window.num_sinks

    @property
    def is_bound(self) -> bool:
        """Whether `bind` was called, if only in the process that this conversation comes from."""
        return len(self.layers) > 0  # and not `bool`, which torch 2.6 can't compile of a list

    @property
    def _rings(self) -> list[Ring]:
        return list(dict.fromkeys(layer.ring for layer in self._sink_layers))

    @property
    def _sink_layers(self) -> list[SinkLayer]:
        return [layer for layer in self.layers if isinstance(layer, SinkLayer)]

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
            for layer in self._sink_layers:
                tensors += [states for states in (layer.evicted.keys, layer.evicted.values) if states is not None]
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
        self._refuse_other_thread()
        if not self.is_bound:
            return self._unbound.update(key_states, value_states, layer_idx, cache_kwargs or {})
        layer = self.layers[layer_idx]
        if self.static:
            return layer.write(key_states, value_states)
        if not isinstance(layer, SinkLayer):
            return layer.update(key_states, value_states, cache_kwargs, *args, **kwargs)
        plan = self.plan_update(layer.seen, key_states.shape[2])
        if not plan.prepared:
            self._refuse_unprepared(plan, key_states.shape[0])
        self.has_evicted |= plan.evicts
        keys, values = layer.update(key_states, value_states, plan)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return keys, values
        # A graph would keep the slots themselves, which the next update writes into.
        if key_states.requires_grad or value_states.requires_grad:
            return _WithoutGraph.apply(keys, values, key_states, value_states)
        return keys.clone(), values.clone()

    def _refuse_unprepared(self, plan: UpdatePlan, batch_size: int) -> None:
        """Raise if the mask or the positions that the model makes by itself can't be right for this step, or known."""
        if any(self.pads or []) or any(self.offsets):
            reason = "its rows were padded, or their positions shifted back, so the model's own count of them is off"
        elif plan.start > 0 and not self._counts:
            reason = "the model would start over from position 0"
        elif plan.start + plan.length > self._trained_length:
            reason = f"the model would count positions past the {self._trained_length} that it was trained on"
        elif plan.evicts and batch_size > 1 and self.pads is None:
            reason = f"it can't see whether any of these {batch_size} rows is padded, so not what to evict"
        elif plan.length > 1 and plan.start > 0 and not self._resumes:
            reason = "the model forgets its states where it gets several tokens at once, so pass one at a time"
        elif plan.sees_copies:
            reason = f"these {plan.length} tokens evict some, and each has to see another part of the window"
        else:
            return
        raise ValueError(
            f"A `SinkCache` can't go on outside of its `generate`: {reason}. Use `generate`, or call the model with "
            "`**past_key_values.prepare_inputs(input_ids, attention_mask)`."
        )

    def prepare_inputs(self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None) -> dict[str, Any]:
        """What to call the bound model with for the next tokens, in a loop of your own: `model(**prepare_inputs(...))`.

        Args:
            input_ids: the new tokens, int64 `[batch, length]`. However they are cut into calls, the logits are the
                same. Of `length` that evict, attention sees `length * num_sink_tokens` keys more: pass a long prompt by
                a few.
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
        self._refuse_other_thread()
        self.settle()
        start, (batch_size, length) = self.get_seq_length(), input_ids.shape
        needed = [batch_size, start + length]
        if attention_mask is not None and list(attention_mask.shape) != needed:
            raise ValueError(
                f"`attention_mask` must be {needed}, for {start} tokens seen and {length} new ones, got "
                f"{list(attention_mask.shape)}."
            )
        at_once = self._most_at_once(start)
        if length > at_once:
            raise ValueError(f"`input_ids` must be at most {at_once} tokens at a time for this model, got {length}.")
        pads = self.pads if start > 0 and attention_mask is None else None
        _begin(self, batch_size, _left_padding(attention_mask) if pads is None else pads)
        inputs = {"input_ids": input_ids, "attention_mask": None, "past_key_values": self}
        return _inputs_for_step(model, self, inputs)

    def _most_at_once(self, start: int) -> int:
        """How many tokens after `start` columns one forward pass can take."""
        return self._ceiling - min(start, self.num_sink_tokens) if start == 0 or self._resumes else 1

    def plan_update(self, start: int, length: int) -> UpdatePlan:
        """The plan of `length` new columns after `start`: made by the first layer that asks, shared by the others."""
        if self._plan is None or (self._plan.start, self._plan.length) != (start, length):
            self._plan = UpdatePlan(self._window, start, length, self.pads or [0], self.offsets)
        return self._plan

    def lower_positions_if_needed(self, length: int) -> None:
        """Before `length` new tokens would reach the ceiling, shift all kept keys back to before position 0.

        That costs O(window_length) once in about `ceiling` tokens, and each key meets it at most once before it leaves
        the window. Keys may lie at negative positions: the model is given those of the new tokens only.
        """
        plan = self.plan_update(self.get_seq_length(), length)
        distances = [
            seen - offset if seen > self.num_sink_tokens and seen - offset + new > self._ceiling else 0
            for seen, new, offset in zip(plan.seen, plan.num_new, self.offsets)
        ]
        if not any(distances):
            return
        back = [-distance for distance in distances]
        for ring in self._rings:
            ring.lower_positions(distances)
        for layer, rotation in zip(self.layers, self._rotations):
            if isinstance(layer, SinkLayer):
                if rotation is not None and layer.evicted.keys is not None:
                    rotation.turn(getattr(layer.evicted, rotation.tensor), back)
            elif rotation is not None and rotation.tensor in _tensors(layer):
                states = getattr(layer, rotation.tensor).clone()
                setattr(layer, rotation.tensor, rotation.turn(states, back))
        self.offsets = [offset + distance for offset, distance in zip(self.offsets, distances)]
        self._plan = None

    def prepare_compiled_step(self, plan: UpdatePlan, device: torch.device) -> torch.Tensor:
        """Before a compiled step: place the sinks, set the slot indices, return the mask.

        The mask is additive, `[rows, 1, 1, window_length]`, and hides the slots that are not filled yet. It stays when
        all are: without a mask, the code would be another.
        """
        for ring in self._rings:
            ring.place_sinks(plan.sink_shifts)
            ring.slots.copy_(torch.tensor(plan.first_slots, dtype=torch.long, device="cpu"))
        if self._slots_mask is None:
            seen = torch.tensor(plan.seen, dtype=torch.long, device=device)[:, None]
            filled = torch.arange(self.window_length, dtype=torch.long, device=device) <= seen
            self._slots_mask = _additive(filled[:, None, None], self._mask_dtype)
        elif min(plan.seen) < self.window_length:
            self._slots_mask[range(len(plan.first_slots)), :, :, plan.first_slots] = 0
        return self._slots_mask

    def settle(self) -> None:
        """Take back a step that an error or an interrupt cut short, when some layers had its tokens and some had not.

        Raises:
            ValueError: layers that slide, or keep a state, were cut short: they can't take tokens back.
        """
        counts = {getattr(layer, "seen", getattr(layer, "cumulative_length", None)) for layer in self.layers}
        counts -= {None}  # of layers that don't count
        plan, has_states = self._plan, any(isinstance(layer, StateLayer) for layer in self.layers)
        begun = {layer.begun for layer in self._sink_layers} | counts
        if self._sinks_only:
            if len(begun) > 1:
                for layer in self.layers:
                    layer.take_back(min(counts), self.pads or [0])
                self._plan = None
        elif len(begun) > 1 or (
            has_states and plan is not None and plan.prepared and {plan.start + plan.length} != counts
        ):
            raise ValueError(
                "The `SinkCache` in `past_key_values` was left in the middle of a forward pass by an error: its layers "
                "disagree about the tokens seen, and those that slide or keep a state can't take them back. `reset()` "
                "it, or use a new one."
            )

    def count_compiled_token(self) -> None:
        """Count the token that a compiled step wrote."""
        self.has_evicted |= self._plan.evicts
        for layer in self.layers:
            layer.count_written()

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
        self._refuse_other_thread()
        stored, length = self.get_seq_length(layer_idx), _query_length(sizes)
        if not self.is_bound:
            return (min(stored + length, self.window_length) if stored else length), 0
        layer = self._counting(layer_idx)
        if not isinstance(layer, SinkLayer):
            return layer.get_mask_sizes(sizes)
        num_keys = self.plan_update(stored, length).num_keys
        return num_keys, stored + length - num_keys

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was: int64 `[batch]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch, in that order: int64 `[new batch]`."""
        self._refuse_other_thread()
        for ring in self._rings:
            ring.reorder(indices)
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.look()
                layer.evicted = layer.evicted.map(lambda states: states.index_select(0, indices.to(states.device)))
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
        self._plan = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self.batch_select_indices(
            torch.arange(max(self.batch_size, 0), dtype=torch.long, device="cpu").repeat_interleave(repeats)
        )

    @property
    def batch_size(self) -> int:
        """The rows of the batch held, -1 if it holds nothing yet."""
        return next((keys.shape[0] for keys in self.key_cache if keys is not None and keys.numel() > 0), -1)

    def crop(self, tokens: Optional[int] = None, **named: int) -> None:
        """Take back the latest tokens: as far as nothing was evicted, and past that those of the last update.

        `activate_past_recording` has all tokens taken back that came since the last `crop`.

        Args:
            tokens: in the convention of the release. If negative, how many columns (tokens, padding included) to
                forget. If positive, how many to keep. 0 is nothing to forget where transformers calls the argument
                `tokens_to_remove`, and nothing to keep where it is `max_length`. Both names are taken.

        Raises:
            TypeError: not one int was given.
            ValueError: what the tokens evicted is gone, a row would be left without a token, or the cache is not bound
                or has layers that can't take tokens back. Nothing is lost then.
        """
        self._refuse_other_thread()
        if tokens is not None or len(named) != 1 or not named.keys() <= {"tokens_to_remove", "max_length"}:
            if tokens is None or named:
                raise TypeError(f"`crop` takes one int, `{CROP_ARGUMENT}`, got {tokens!r} and {named}.")
            named = {CROP_ARGUMENT: tokens}
        ((name, tokens),) = named.items()
        tokens = _integer(name, tokens)  # assisted decoding of some releases counts in a tensor
        self.settle()
        seen = self.get_seq_length()
        end = tokens if tokens > 0 or (tokens == 0 and name == "max_length") else seen + tokens
        if end >= seen and seen > 0:
            end = seen  # there is nothing to forget, which settles what was recorded
        self._take_back(end, f"`{name}`", tokens)

    def _take_back(self, end: int, name: str, value: int) -> None:
        """Forget all columns from `end` on, or raise and say that `name` asked for it."""
        seen, pads = self.get_seq_length(), self.pads or [0]
        if not self.is_bound or not self._can_take_back:
            raise ValueError(
                "A `SinkCache` can be cropped only if bound to a model with full attention in every layer, or where "
                "transformers lets the layers that slide take tokens back, after `activate_past_recording()`. Got "
                f"{name} {value}."
            )
        if end < seen and end <= max(pads):
            if end == 0:
                self.reset()
                return
            raise ValueError(
                f"{name} must leave a token of each row, {max(pads) + 1} columns or more, got {value} of {seen}. To "
                "forget all of them, `reset()` it."
            )
        if end < seen - self.num_removable:
            raise ValueError(
                f"{name} can forget {self.num_removable} of the {seen} tokens seen, got {value}: what those before "
                f"evicted from the window of {self.window_length} is gone. `reset()` it and pass the conversation anew."
            )
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.take_back(end, pads)
            else:
                layer.crop(end - seen)
        self.forget_unseen_ids()
        self._plan = None

    def forget_unseen_ids(self) -> None:
        """Of the last tokens that `generate` was passed, keep those that were seen."""
        end = self.get_seq_length()
        if self.latest_ids is not None and self.latest_end > end:
            self.latest_ids, self.latest_end = self.latest_ids[:, : end - self.latest_end], end

    @property
    def num_removable(self) -> int:
        """How many of the latest columns `crop` can forget."""
        if not self.is_bound or not self._can_take_back:
            return 0
        if not self.has_evicted and not any(self.offsets):
            return self.get_seq_length()
        return min(layer.evicted.columns for layer in self._sink_layers)

    def common_length(self, input_ids: torch.Tensor, first: int = 0) -> int:
        """Up to which column the conversation of `input_ids` is the one held, as far as its tokens are known.

        Args:
            input_ids: int64 `[batch, length]`, of the columns from `first` on.
        """
        seen, end = self.get_seq_length(), first + input_ids.shape[1]
        if self.latest_ids is None or len(self.latest_ids) != len(input_ids):
            return min(seen, end)
        latest_first = self.latest_end - self.latest_ids.shape[1]
        start, stop = max(first, latest_first), min(end, seen, self.latest_end)
        if stop <= start:  # none of them is known; of what ends before those that are, none can be
            return 0 if end <= latest_first else min(seen, end)
        known = self.latest_ids[:, start - latest_first : stop - latest_first].to(input_ids.device)
        others = (input_ids[:, start - first : stop - first] != known).any(dim=0).nonzero()
        return start + int(others[0]) if len(others) > 0 else min(seen, end)

    def activate_past_recording(self) -> None:
        """Keep what tokens evict until `crop` is called, not only what those of the last update did.

        At most a window of it is kept. Assisted decoding of transformers calls this in newer releases.
        """
        self.record_past = True

    @property
    def record_past(self) -> bool:
        """Whether what tokens evict is kept until `crop` is called."""
        return any(layer.record_past for layer in self._sink_layers)

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        for layer in self.layers:
            if _can_record(layer):
                layer.record_past = recording

    @property
    def _can_take_back(self) -> bool:
        """Whether all layers can forget their latest tokens."""
        return all(type(layer) is SinkLayer or (_can_record(layer) and layer.record_past) for layer in self.layers)

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write the conversation held to one safetensors file, from which `load` goes on in any process.

        A file that is there is replaced at once, by one of the same mode: whatever ends this, also a kill, either the
        old conversation is there or the new one. What a kill leaves beside it, a folder `.sink_cache-*`, the next
        `save` in the same folder removes.

        Raises:
            ValueError: the cache is not bound, empty, in use, holds numbers that are not finite, or was left in the
                middle of a forward pass by an error.
            OSError: `path` can't be written.
        """
        if not self.is_bound or self.get_seq_length() == 0:
            raise ValueError("Only a bound `SinkCache` that holds tokens can be saved.")
        self._refuse_other_thread()
        self.settle()
        for ring in self._rings:  # as the model made them, which is all that there is to know
            ring.place_sinks([0])
        model = None if self._model is None else self._model()
        if model is not None:
            self._fingerprint = _fingerprint_now(model)
        tensors, seen = {"fingerprint": self._fingerprint}, self.get_seq_length()
        for layer_idx, rotation in enumerate(self._rotations):
            if rotation is not None:
                tensors[f"frequencies.{layer_idx}"] = rotation.frequencies.clone()
        self.forget_unseen_ids()
        if self.latest_ids is not None and self.latest_ids.numel() > 0:
            tensors["latest_ids"] = self.latest_ids
        for layer_idx, layer in enumerate(self.layers):
            tensors |= {f"{name}.{layer_idx}": tensor for name, tensor in _tensors(layer).items()}
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                raise ValueError(f"The `SinkCache` can't be saved: its {name!r} holds numbers that are not finite.")
        state = {
            "version": FORMAT_VERSION,
            "window_length": self.window_length,
            "num_sink_tokens": self.num_sink_tokens,
            "seen": seen,
            "pads": self.pads or [0],
            "padding_known": self.pads is not None,
            "offsets": self.offsets,
            "has_evicted": self.has_evicted,
            "latest_end": self.latest_end if "latest_ids" in tensors else 0,
        }
        state["checksum"] = _checksum(state, tensors)
        _write_file(path, tensors, {"sink_cache": json.dumps(state)})

    @classmethod
    def load(cls, path: Union[str, os.PathLike], model: PreTrainedModel) -> "SinkCache":
        """The cache that `save` wrote to `path`, bound to `model`, which must be the one that it was bound to.

        `model` is run on a few tokens, for what its layers hold; nothing is changed on it.

        Raises:
            ValueError: `path` is no such file, or a damaged one, of a newer format, or of a conversation with another
                model. It names the path, and says which it is.
            OSError: `path` can't be read.
        """
        state, tensors = _read_file(path)
        try:
            state, whole = _checked_state(state, tensors), tensors
            _refuse_damaged_ids(state, tensors.get("latest_ids"))
            fingerprint = tensors.get("fingerprint")
            _require(
                fingerprint is not None and fingerprint.dtype == torch.float32 and _is_finite(fingerprint),
                "its `fingerprint` must be there, in float32, and finite",
            )
            cache = cls(state["window_length"], state["num_sink_tokens"]).bind(model)
            if not _are_alike(_fingerprint_now(model), fingerprint):
                raise ValueError(OTHER_MODEL)
            tensors = _refuse_other_frequencies(cache, state, tensors)
            _refuse_damaged_layers(state, tensors, _layout(cache), cache.layers)
            _require(
                state.get("checksum") in (None, _checksum(state, whole)),
                "something in it was changed after it was written: its checksum is another",
            )
        except ValueError as error:
            raise ValueError(f"The conversation in `path`, {os.fspath(path)!r}, can't be loaded: {error}") from error
        cache.pads = state["pads"] if state["padding_known"] else None
        cache.offsets, cache.latest_end = state["offsets"], state["latest_end"]
        cache.has_evicted = state["has_evicted"]
        cache.latest_ids = tensors.get("latest_ids")
        for layer_idx, layer in enumerate(cache.layers):
            held = {}
            for name, tensor in tensors.items():
                if name.rpartition(".")[2] == str(layer_idx):
                    held[name.rpartition(".")[0]] = tensor.to(_device(model))
            _hold(layer, held, state["seen"])
        return cache


OTHER_MODEL = (
    "The `SinkCache` comes from a conversation with another model, whose keys and values mean nothing to this one. Use "
    "the model that it was held with."
)


def _are_alike(fingerprint: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the fingerprints are the same model's, in whatever dtype."""
    return fingerprint.shape == other.shape and bool((fingerprint - other).norm() <= 0.1 * other.norm())


def _layers(model: PreTrainedModel, window: Window, reading: Reading) -> list:
    """A new layer for each of the model's: sinks and a window where it attends to all tokens, else what it has."""
    own = [] if _slides_everywhere(model) else _own_layers(model)
    layers, rings = [], {}
    for layer, rotation, slots in itertools.zip_longest(own[: len(reading.slots)], reading.rotations, reading.slots):
        if (rotation, slots) not in rings:
            rings[rotation, slots] = Ring(window, rotation)
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
# The file of a conversation
# ---------------------------------------------------------------------------------------------------------------------

# A safetensors file with `keys.0`, `values.0`, ... of the layers, `frequencies.0`, ..., by which their keys turn, the
# model's `fingerprint`, and the `latest_ids`, if any are known. Its metadata has one entry, `sink_cache`: the state of
# the cache, a JSON object with these fields.
FORMAT_VERSION = 1
SAVED_NUMBERS = ("version", "window_length", "num_sink_tokens", "seen", "latest_end", "checksum")
SAVED_FIELDS = {*SAVED_NUMBERS, "pads", "padding_known", "offsets", "has_evicted"}
# Until there were versions, a file had neither of these two.
FIELDS_OF_VERSIONS = {"version", "checksum"}

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite; `isfinite` would make copies of it."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _checksum(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of a conversation: of its state, but for the checksum, and of its tensors."""
    fields = {name: value for name, value in state.items() if name != "checksum"}
    checksum = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def _write_file(path: Union[str, os.PathLike], tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in a folder of its own, then put it in the place of the file at `path`, if there is one.

    By itself safetensors writes over that file, which a kill would lose. From 0.8 on it replaces the file, but with one
    of another mode, and a symbolic link too; and a kill leaves files beside it.

    Raises:
        OSError: it can't be written; `path` is as it was.
    """
    target = os.path.realpath(path)
    try:
        old = os.stat(target) if os.path.exists(target) else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if old is not None and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, "it is write-protected")
        with _folder_beside(target) as folder:
            written = os.path.join(folder, "conversation")
            with open(written, "wb") as file:  # which has the mode of a new file
                mode = os.fstat(file.fileno()).st_mode if old is None else old.st_mode
            safetensors.torch.save_file(tensors, written, metadata)
            with open(written, "rb+") as file:
                os.fsync(file.fileno())
            if old is not None and hasattr(os, "chown"):
                for owner in ((old.st_uid, -1), (-1, old.st_gid)):
                    with contextlib.suppress(OSError):  # not everyone may give files away
                        os.chown(written, *owner)
            os.chmod(written, stat.S_IMODE(mode))
            os.replace(written, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"`path` can't be written, got {os.fspath(path)!r}: {error}") from error


@contextlib.contextmanager
def _folder_beside(path: str) -> Iterator[str]:
    """A new folder beside `path`, for as long as the block takes.

    If a kill ends the block, the folder stays until this is called again, which knows it by its lock: nobody holds it.
    """
    parent, prefix = os.path.dirname(path), ".sink_cache-"
    with contextlib.suppress(OSError):  # what can't be removed may stay
        for name in os.listdir(parent):
            left = os.path.join(parent, name)
            lock = _lock(left, wait=False) if name.startswith(prefix) else None
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                _unlock(lock)
    while True:
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        lock = _lock(folder, wait=True)
        if os.path.exists(folder):  # and was not taken for one that was left, before it was locked
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _lock(folder: str, wait: bool) -> Optional[int]:
    """The file descriptor that locks a folder until it is closed; None if it can't be had, at once or with a `wait`."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(lock: Optional[int]) -> None:
    """Give back what `_lock` returned."""
    if lock is not None:
        os.close(lock)


def _require(holds: bool, reason: str) -> None:
    """Raise a ValueError that gives this reason unless `holds`."""
    if not holds:
        raise ValueError(reason)


def _read_file(path: Union[str, os.PathLike]) -> tuple[str, dict[str, torch.Tensor]]:
    """The state (JSON) and the tensors that `SinkCache.save` wrote to `path`.

    Raises:
        ValueError: it is another file, or not a whole one.
        OSError: it can't be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = (file.metadata() or {}).get("sink_cache")
            _require(state is not None, "its metadata has no entry `sink_cache`")
            # Copied, or the file could not be removed as long as they are there.
            return state, {name: file.get_tensor(name).clone() for name in file.keys()}
    except OSError:
        raise
    except Exception as error:  # of safetensors, or of a torch that doesn't know a dtype
        raise ValueError(
            f"`path` must be a file that `SinkCache.save` wrote, got {os.fspath(path)!r}: {error}"
        ) from error


def _is_count(value: Any) -> bool:
    """Whether a value out of JSON is an int of at least 0; true and false are none."""
    return type(value) is int and value >= 0


def _checked_state(text: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state in a file's metadata, if there is nothing wrong with it.

    Raises:
        ValueError: there is; it says what.
    """
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is no JSON: {error}") from error
    _require(isinstance(state, dict), "its metadata is no JSON object")
    for name in SAVED_NUMBERS:
        value = state.get(name, 0)
        _require(_is_count(value), f"its `{name}` must be an int of at least 0, got {value!r}")
    version, needed = state.get("version", FORMAT_VERSION), SAVED_FIELDS
    _require(
        version <= FORMAT_VERSION,
        f"its format has version {version}, newer than the version {FORMAT_VERSION} that is known here. Load it with "
        "the `SinkCache` that wrote it, or a later one",
    )
    if not FIELDS_OF_VERSIONS & state.keys():
        needed = SAVED_FIELDS - FIELDS_OF_VERSIONS
        pads = state.get("pads")
        state = {**state, "pads": pads or [0], "padding_known": pads is not None, "has_evicted": True}
    missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - needed)
    _require(not missing, f"its metadata lacks {', '.join(missing)}")
    _require(not unknown, f"its metadata has entries that are not known here: {', '.join(unknown)}")

    window_length, num_sink_tokens, seen = (state[name] for name in ("window_length", "num_sink_tokens", "seen"))
    _require(
        num_sink_tokens < window_length,
        f"its `num_sink_tokens` must be less than its `window_length`, got {num_sink_tokens} and {window_length}",
    )
    slots = {tensor.shape[2] for name, tensor in tensors.items() if name.startswith("keys.") and tensor.dim() == 4}
    _require(window_length in slots, f"its `window_length` is {window_length}, but no layer's keys have as many slots")
    _require(seen > 0, "its `seen` must be at least 1, got 0")
    for name in ("pads", "offsets"):
        counts = state[name]
        _require(
            isinstance(counts, list) and len(counts) > 0 and all(map(_is_count, counts)),
            f"its `{name}` must be a list of ints of at least 0, got {counts!r}",
        )
    pads, offsets, known = state["pads"], state["offsets"], state["padding_known"]
    _require(len(pads) == len(offsets), f"its `pads` and `offsets` must be as many, got {pads} and {offsets}")
    for pad, offset in zip(pads, offsets):
        _require(pad < seen, f"its `pads` must leave a token of the {seen} seen, got {pad}")
        _require(pad + offset <= seen, f"its `offsets` must be at most the tokens of the row, got {offset}")
    for name in ("padding_known", "has_evicted"):
        _require(isinstance(state[name], bool), f"its `{name}` must be true or false, got {state[name]!r}")
    _require(known or pads == [0], f"its `pads` must be [0] where `padding_known` is false, got {pads}")
    return state


def _refuse_damaged_ids(state: dict[str, Any], ids: Optional[torch.Tensor]) -> None:
    """Raise unless the `latest_ids` of a file go with its state: int64 `[batch, columns]`, None if none are known."""
    end, seen = state["latest_end"], state["seen"]
    _require(end <= seen, f"its `latest_end` must be at most its `seen`, got {end} and {seen}")
    _require(
        (ids is None) == (end == 0),
        f"its `latest_end` is {end}, and `latest_ids` are {'in' if end == 0 else 'not in'} it",
    )
    if ids is not None:
        _require(
            ids.dtype == torch.int64 and ids.dim() == 2 and 0 < ids.shape[1] <= end and bool((ids >= 0).all()),
            f"its `latest_ids` must be int64 [batch, 1 to {end}], and not negative, got {ids.dtype} {list(ids.shape)}",
        )


@torch.no_grad()
def _layout(cache: SinkCache) -> list[dict[str, torch.Size]]:
    """The names and shapes of what each layer of a new, bound cache holds after one token, which it forgets again."""
    model = cache._model()
    model(**cache.prepare_inputs(_some_tokens(model, 1)[:1]), use_cache=True)
    layout = [{name: tensor.shape for name, tensor in _tensors(layer).items()} for layer in cache.layers]
    cache.reset()
    return layout


def _refuse_other_frequencies(
    cache: SinkCache, state: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`tensors` of a file without the frequencies; raise unless those are what the keys of `cache` turn by."""
    named = {name: tensor for name, tensor in tensors.items() if name.startswith("frequencies.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in named}
    if not named and "checksum" not in state:  # until there were versions, files had none
        return rest
    turning = {
        f"frequencies.{layer_idx}": rotation
        for layer_idx, rotation in enumerate(cache._rotations)
        if rotation is not None
    }
    layers = {f"frequencies.{layer_idx}" for layer_idx in range(len(cache._rotations))}
    missing, unknown = sorted(turning.keys() - named.keys()), sorted(named.keys() - layers)
    _require(not missing, f"it lacks {', '.join(missing)}")
    _require(not unknown, f"the model has no layers for what it holds as {', '.join(unknown)}")
    for name, rotation in turning.items():
        held, needed = named[name], list(rotation.frequencies.shape)
        _require(
            held.dtype == torch.float64 and list(held.shape) == needed and _is_finite(held),
            f"its {name} must be {needed} finite numbers in float64, got {list(held.shape)} in {held.dtype}",
        )
    rotations = [replace(rotation, frequencies=named[name]) for name, rotation in turning.items()]
    if named.keys() != turning.keys() or not _turn_alike(rotations, list(turning.values())):
        raise ValueError(OTHER_MODEL)
    return rest


def _refuse_damaged_layers(
    state: dict[str, Any], tensors: dict[str, torch.Tensor], layout: list[dict[str, torch.Size]], layers: list
) -> None:
    """Raise unless the `tensors` of a file are what `layers` of such a `layout` hold in such a `state`."""
    expected: dict[str, Optional[torch.Size]] = {}
    for layer_idx, shapes in enumerate(layout):
        expected |= {f"{name}.{layer_idx}": shape for name, shape in shapes.items()}
        media = [f"{name}.{layer_idx}" for name in ("keys", "values")]
        if not shapes and not tensors.keys().isdisjoint(media):  # a layer for images, and there were some
            expected |= dict.fromkeys(media)
    held = tensors.keys() - {"fingerprint", "latest_ids"}
    missing, unknown = sorted(expected.keys() - held), sorted(held - expected.keys())
    _require(not missing, f"it lacks {', '.join(missing)}")
    _require(not unknown, f"the model has no layers for what it holds as {', '.join(unknown)}")

    rows = {name: len(tensor) if tensor.dim() > 0 else 0 for name, tensor in tensors.items() if name != "fingerprint"}
    _require(len({*rows.values()}) == 1, f"its tensors must be of as many rows, got {rows}")
    batch_size = next(iter(rows.values()))
    num_pads = len(state["pads"])
    _require(
        num_pads in (1, batch_size), f"its `pads` must be one, or one for each of {batch_size} rows, got {num_pads}"
    )
    for name, shape in expected.items():
        tensor, (part, _, layer_idx) = tensors[name], name.rpartition(".")
        _require(tensor.dtype in FLOATS, f"its {name} must be floats, got {tensor.dtype}")
        _require(_is_finite(tensor), f"its {name} holds numbers that are not finite")
        if shape is None:
            _require(tensor.dim() == 4, f"its {name} must have 4 dimensions, got {tensor.dim()}")
            continue
        needed, reach = [batch_size, *shape[1:]], getattr(layers[int(layer_idx)], "sliding_window", None)
        if part in ("keys", "values") and reach is not None and tensor.dim() == 4:
            # It keeps as many of the latest tokens as the next one sees, and may have been asked to keep more.
            needed[2] = max(min(state["seen"], reach - 1), min(tensor.shape[2], state["seen"]))
        _require(
            list(tensor.shape) == needed,
            f"its {name} must be {needed} for this model and window, got {list(tensor.shape)}",
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the model is given
# ---------------------------------------------------------------------------------------------------------------------

# Inputs with an entry for each token, and the dimension in which they have it.
PER_TOKEN_INPUTS = {"input_ids": 1, "inputs_embeds": 1, "token_type_ids": 1, "mm_token_type_ids": 1}
PER_TOKEN_INPUTS |= {"position_ids": -1, "cache_position": -1}

# What `generate` appends to at each step, beside its ids and the mask.
GROWING_INPUTS = ("position_ids", "token_type_ids", "mm_token_type_ids")


def _stand_in(module: torch.nn.Module) -> Any:
    """An object that shares all of `module`: what is set on it is not set on the module."""
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    return stand_in


def _streaming(
    model: PreTrainedModel,
    cache: SinkCache,
    prefill_chunk_size: Optional[int],
    prefill_progress: bool,
    synced: bool,
) -> PreTrainedModel:
    """A stand-in for `model` for the length of one call: it shares all of it and prepares its inputs for `cache`.

    `synced` is for a `SyncedRank`.

    Every decoding loop of transformers passes by `prepare_inputs_for_generation`. The stand-in has its own, so nothing
    is set on the model: calls from other threads can't meet this one's, and nothing has to be undone after an error.
    """
    stand_in = _stand_in(model)
    # A model loaded from a repository that carries this file has `generate` below in its own place.
    stand_in.__dict__.pop("generate", None)
    stand_in.__dict__ |= {"_streamed": (model, cache), "_handed_on": False}
    prepare_model, prepare = model._prepare_model_inputs, model.prepare_inputs_for_generation
    prepare_length, get_criteria = model._prepare_generated_length, model._get_stopping_criteria
    update, criteria = model._update_model_kwargs_for_generation, model._valid_auto_compile_criteria
    begun = compiled = False
    # Of the conversation: its columns, those before the ids, whether its mask came with them, and its embeddings.
    columns, left_out, mask_given, embeddings = 0, 0, False, None

    def prepare_model_inputs(inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> tuple:
        """As ever. It is the first that sees what the loop was given, by a `generate` of the model's own perhaps."""
        nonlocal begun, columns, left_out, mask_given, embeddings
        if model_kwargs.get("past_key_values") is cache:
            columns, left_out, end = _columns_in_common(cache, {"inputs": inputs} | model_kwargs)
            if end < cache.get_seq_length():
                cache.crop(max_length=end)
            stand_in._handed_on = True
            embeddings = model_kwargs.get("inputs_embeds")
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
            positions = _natural_positions(cache, end - start)
            kwargs["position_ids"] = positions.to(input_ids.device).expand(len(input_ids), -1)
        cache.latest_ids, cache.latest_end = input_ids, end
        _count_columns(kwargs, start, end, input_ids.device)
        if prompt and embeddings is not None:  # 5.x cuts off what was seen, of new ones alone too
            new = embeddings[:, start - end :]
            kwargs["inputs_embeds"] = new.repeat_interleave(len(kwargs["inputs_embeds"]) // len(new), dim=0)
            kwargs["next_sequence_length"] = end - start
        inputs = prepare(input_ids, *args, **kwargs)
        # Some start over where their frequencies change, and 5.3 and later take new ids for new tokens all.
        if inputs.get("past_key_values") is not cache or _new_tokens(inputs).shape[1] > end - start:
            inputs = _cut(inputs, slice(start - end, None)) | {"past_key_values": cache}
        if not prompt:
            return _inputs_for_step(stand_in, cache, inputs)
        # The logits of a draft, which assisted decoding appends to the prompt, and of the token before it are needed.
        chunks = _chunks(model, cache, _new_tokens(inputs).shape[1], prefill_chunk_size, least_last=end - columns + 1)
        _refuse_media(inputs, chunks)
        _refuse_other_positions(cache, inputs.get("position_ids"))
        idle_passes = rank.idle_passes(len(chunks), input_ids.device) if rank else 0
        recording = cache.record_past
        cache.record_past = recording and len(chunks) == 1  # nobody takes back what comes before the last chunk
        for chunk in transformers.logging.tqdm(chunks[:-1], desc="prompt", unit="chunk", disable=not prefill_progress):
            stand_in(**_inputs_for_step(stand_in, cache, _cut(inputs, chunk)), return_dict=True)
        for _ in range(idle_passes):
            stand_in(**rank.idle_inputs(input_ids), return_dict=True)
        cache.record_past = recording
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
                cache.count_compiled_token()
            return outputs

        return compiled_call

    stand_in._prepare_model_inputs = prepare_model_inputs
    stand_in.prepare_inputs_for_generation = prepare_inputs_for_generation
    stand_in._update_model_kwargs_for_generation = update_model_kwargs
    stand_in._prepare_generated_length = prepare_generated_length
    stand_in._get_stopping_criteria = get_stopping_criteria
    stand_in._valid_auto_compile_criteria = valid_auto_compile_criteria
    stand_in.get_compiled_call = get_compiled_call
    rank = SyncedRank(stand_in) if synced else None
    return stand_in


class SyncedRank:
    """One of several processes that generate with one distributed model, each its own text (`synced_gpus`).

    FSDP and DeepSpeed ZeRO-3 collect a layer's weights from all ranks whenever it runs, so all ranks must run as many
    forward passes. A rank that has no more to do runs *idle* ones until all are finished: one token for each row, with
    a cache that is thrown away. By itself transformers has it go on in its own cache, with tokens that were seen.

    Args:
        stand_in: the rank's model for one call of `generate`. Its methods are replaced by those that know idle passes.
    """

    def __init__(self, stand_in: PreTrainedModel):
        self.stand_in = stand_in
        self.finished = False  # whether this rank only waits for others
        self._has_unfinished_sequences = stand_in._has_unfinished_sequences
        self._get_compiled_call = stand_in.get_compiled_call
        stand_in._has_unfinished_sequences = self.has_unfinished_sequences
        stand_in.get_compiled_call = self.get_compiled_call
        stand_in.prepare_inputs_for_generation = self._unless_finished(
            stand_in.prepare_inputs_for_generation, self.idle_inputs
        )
        stand_in._update_model_kwargs_for_generation = self._unless_finished(
            stand_in._update_model_kwargs_for_generation, self.same_model_kwargs
        )

    def _unless_finished(self, method: Callable, idle: Callable) -> Callable:
        """`method`, or `idle` in its place once this rank is finished."""

        @functools.wraps(method)  # transformers looks up the arguments that it takes
        def call(*args, **kwargs) -> Any:
            return idle(*args, **kwargs) if self.finished else method(*args, **kwargs)

        return call

    def has_unfinished_sequences(self, this_peer_finished: "torch.Tensor | bool", *args, **kwargs) -> bool:
        """As ever: whether any rank has to go on. That is when this one may be finished before others."""
        unfinished = self._has_unfinished_sequences(this_peer_finished, *args, **kwargs)
        self.finished = unfinished and bool(this_peer_finished)
        return unfinished

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """As ever, but idle passes are not compiled: their cache grows by itself."""
        return self._unless_finished(self._get_compiled_call(compile_config), self.stand_in.__call__)

    def idle_inputs(self, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
        """The model's inputs for an idle pass of as many rows as `input_ids`: its output means nothing."""
        tokens = input_ids.new_zeros(len(input_ids), 1)
        cache = _own_cache(self.stand_in.config)
        return {
            "input_ids": tokens,
            "position_ids": torch.zeros_like(tokens),
            "past_key_values": cache,
            "use_cache": True,
        }

    def same_model_kwargs(self, outputs: Any, model_kwargs: dict[str, Any], *args, **kwargs) -> dict[str, Any]:
        """After an idle pass nothing has changed."""
        return model_kwargs

    def idle_passes(self, passes: int, device: torch.device) -> int:
        """How many idle passes this rank adds to the `passes` of its prompt, so that it has as many as any other."""
        most = torch.tensor(passes, dtype=torch.long, device=device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most) - passes


def _is_compileable(model: PreTrainedModel, cache: SinkCache) -> bool:
    """Whether the model's code for one token can be compiled with this cache, as transformers does it by itself."""
    return COMPILES and cache._sinks_only and _takes_masks(model) and getattr(model, "_can_compile_fullgraph", True)


def _begin(cache: SinkCache, batch_size: int, pads: list[int]) -> None:
    """Take over a batch's padding if `cache` is empty; raise if it holds another batch, or other padding."""
    if cache.get_seq_length() == 0:
        cache.pads, cache.offsets, cache._plan = pads, [0] * len(pads), None
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
    if cache.common_length(input_ids, end - input_ids.shape[1]) < cache.get_seq_length():
        raise ValueError(
            "`input_ids` must continue the conversation in `past_key_values`, but are not the tokens that the "
            "`SinkCache` has seen. To start another one, `reset()` it."
        )


def _new_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """The ids, or embeddings, of the new tokens among the model's inputs: `[batch, length, ...]`."""
    return inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]


def _natural_positions(cache: SinkCache, length: int) -> torch.Tensor:
    """Which tokens of their rows the next `length` columns are, negative for padding: int64 `[rows, length]`."""
    start, pads = cache.get_seq_length(), torch.tensor(cache.pads, dtype=torch.long, device="cpu")[:, None]
    return torch.arange(start, start + length, dtype=torch.long, device="cpu") - pads


def _cut(inputs: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The same inputs for the new tokens `tokens` only."""
    cut = dict(inputs)
    for name, dim in PER_TOKEN_INPUTS.items():
        if isinstance(cut.get(name), torch.Tensor):
            cut[name] = cut[name][..., tokens] if dim == -1 else cut[name][:, tokens]
    return cut


MOST_IN_A_CHUNK = 256  # tokens, by default


def _chunks(
    model: PreTrainedModel, cache: SinkCache, length: int, prefill_chunk_size: Optional[int], least_last: int = 1
) -> list[slice]:
    """Cut `length` new tokens of a prompt into updates: what fits into the window at once, the rest in chunks.

    How a prompt is cut is a matter of time and memory alone. A chunk costs a pass over the weights, and for each token
    of it attention sees one more copy of the sinks. So by default a chunk has so many tokens that these copies take
    three quarters of a window, and at most 256: with more of them, attention would take more time than passes save.

    Args:
        least_last: how many tokens the last update must have at least.
    """
    start, window = cache.get_seq_length(), cache._window
    default = min(max(3 * window.length // (4 * max(window.num_sinks, 1)), 1), MOST_IN_A_CHUNK)
    chunk_size = prefill_chunk_size or default
    takes_masks = _takes_masks(model)
    if not cache._resumes or not takes_masks:
        chunk_size = 1
    chunk_size = min(chunk_size, cache._most_at_once(start + length))
    fits = window.length - max(max(start - pad, 0) for pad in cache.pads)
    sizes = []
    while sum(sizes) < length:
        unevicted = fits - sum(sizes) if cache._resumes or start + sum(sizes) == 0 else 0
        size = min(unevicted, prefill_chunk_size or unevicted) if unevicted > 0 else chunk_size
        sizes.append(min(size, length - sum(sizes)))
    while sizes[-1] < least_last and len(sizes) > 1:
        last = sizes.pop()
        moved = min(least_last - last, sizes[-1])
        sizes[-1:] = [size for size in (sizes[-1] - moved, last + moved) if size > 0]
    if not takes_masks and len(sizes) > 1:
        _logger.warning_once(
            "Past the window this prompt goes in token by token: the model's `attn_implementation`, flash attention, "
            'takes no mask. Load the model with "sdpa" to have it go in faster.'
        )
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


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
    length = tokens.shape[1]
    cache.lower_positions_if_needed(length)
    plan = cache.plan_update(cache.get_seq_length(), length)
    plan.prepared = True
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _natural_positions(cache, length).clamp(min=0).to(tokens.device)
    if any(cache.offsets):
        positions = positions - torch.tensor(cache.offsets, dtype=torch.long, device=positions.device)[:, None]
    inputs["position_ids"] = positions
    if cache.static:
        # Strides that depend on how many tokens there were would have the code compiled again.
        inputs["position_ids"] = positions.clone(memory_format=torch.contiguous_format)
        inputs["attention_mask"] = cache.prepare_compiled_step(plan, tokens.device)
    elif any(cache.pads) or plan.evicts:
        inputs["attention_mask"] = _masks(model, cache, plan, tokens)
    return inputs


def _masks(model: PreTrainedModel, cache: SinkCache, plan: UpdatePlan, tokens: torch.Tensor) -> Any:
    """The mask over the kept keys and the new `tokens` (`[batch, length, ...]`), or one for each kind of layer.

    None where each token sees all keys of before and, causally, the new ones.
    """
    if plan.needs_mask and not _takes_masks(model):
        raise ValueError(
            "`attention_mask` has padding, which needs a mask over the kept tokens that this model's "
            '`attn_implementation`, flash attention, does not take. Load the model with "sdpa".'
            if not plan.sees_copies
            else f"These {plan.length} tokens evict some, which needs a mask that this model's `attn_implementation`, "
            'flash attention, does not take. Pass one token at a time, or load the model with "sdpa".'
        )
    padded, mask = any(cache.pads), None
    # A layer that is neither, and no sink layer, is for what comes beside text: such models take no masks by kind.
    several = any(type(layer).__name__ in KEPT_LAYERS or isinstance(layer, StateLayer) for layer in cache.layers)
    by_kind = several and (padded or plan.sees_copies)
    # Given masks by kind a model makes none by itself, and before 4.54 it makes a wrong one.
    leaves_it = (by_kind and plan.length > 1) or not MASKS_FOLLOW_THE_CACHE
    if plan.needs_mask or (leaves_it and _takes_masks(model)):
        mask = plan.mask(cache._mask_dtype, tokens.device)
    if not by_kind:
        return mask
    attended = None
    if padded:
        columns = torch.arange(plan.start + plan.length, dtype=torch.long, device=tokens.device)
        attended = columns >= torch.tensor(cache.pads, dtype=torch.long, device=tokens.device)[:, None]
        attended = attended.expand(len(tokens), -1)
    # As a mask of padding, which transformers leaves out where a token comes alone, padding or not.
    of_states = attended[:, -plan.length :] if plan.start < max(cache.pads) else None
    kinds = {"sliding_attention", "chunked_attention"}.intersection(_kinds(model.config))
    return {
        "full_attention": mask,
        "hybrid": mask,
        "linear_attention": of_states,
        "conv": of_states,
        **{kind: _own_mask(kind, model, cache, attended, plan, tokens) for kind in kinds},
    }


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


# Settings of a generation that are served here, or that a model's files ask for and `past_key_values` replaces.
SERVED = {"prefill_chunk_size": None, "cache_implementation": None, "use_cache": True, "return_legacy_cache": None}


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
                `attention_mask` of all. A new, unbound cache is bound to `model`. Until the call ends, no other may use
                the cache.
            prefill_chunk_size (`int`): the most tokens of a prompt in one forward pass, a matter of time and memory
                alone. By default a prompt goes in at once as far as the window holds it. What is beyond goes in by
                chunks of `3/4 * window_length / num_sink_tokens`, at most 256: attention sees a copy of the sinks for
                each token of a chunk, and these take three quarters of a window.
            assistant_model, prompt_lookup_num_tokens, assistant_early_exit: decode with drafts (arXiv:2211.17192). An
                assistant drafts in a window of its own, as long as the model's.

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
    kwargs.pop("prefill_chunk_size", None)
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = _with(kwargs["generation_config"], **SERVED)
    if streamed is not None and kwargs.get("past_key_values") is streamed:
        return loop.__get__(stand_in)(**kwargs)  # an override that asks for a stream by itself, called by hand
    window = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    cache = kwargs.pop("past_key_values", None)
    if cache is None:
        settings = {name: _setting(model, window | kwargs, name) for name in window}
        cache = SinkCache(**{name: value for name, value in settings.items() if value is not None})
    else:
        _refuse_cache(cache, window)
    call = Call()
    try:
        cache._take_into_use(call)
        return _generate(model, loop, cache, chunk_size, prefill_progress, kwargs)
    finally:
        cache._give_back(call)


def _generate(
    model: PreTrainedModel,
    loop: Callable,
    cache: SinkCache,
    chunk_size: Optional[int],
    prefill_progress: bool,
    kwargs: dict[str, Any],
) -> Any:
    """`generate` in a cache that is in use by this call alone; `kwargs` are the arguments of `loop`."""
    cache.settle()
    if loop.__module__.startswith("transformers.generation"):  # else nobody knows yet what it will be given
        _columns_in_common(cache, kwargs)
    if _assistance(model, kwargs):
        _refuse_assistance(model, cache, kwargs)
    if kwargs.get("assistant_model") is not None:
        kwargs["assistant_model"] = _drafting(_unwrapped(kwargs["assistant_model"], "assistant_model"), cache._window)
    cache.bind(model)
    depth = _setting(model, kwargs, "assistant_early_exit")
    lent = _with_its_own_depth(model) if depth else model
    synced = _is_synced(model, kwargs.get("synced_gpus"))
    stand_in = _streaming(lent, cache, chunk_size, prefill_progress, synced)
    if depth:
        stand_in.generate = _drafting(model, cache._window, lent, depth).generate
    return _decode(stand_in, loop, cache, kwargs)


def _decode(stand_in: PreTrainedModel, loop: Callable, cache: SinkCache, kwargs: dict[str, Any]) -> Any:
    """Run the decoding `loop` in `cache` on a stand-in for the model, which is of no use afterwards."""
    stand_in.generation_config = _with(stand_in.generation_config, **SERVED)
    recorded = cache.record_past
    try:
        output = loop.__get__(stand_in)(past_key_values=cache, **kwargs)
        if not stand_in._handed_on:
            raise ValueError(
                f"`model` ({type(stand_in).__name__}) has a `generate` of its own that did not hand `past_key_values` "
                "on to that of transformers, so nothing was streamed. Have it pass on the arguments that it doesn't "
                "know."
            )
        return output
    finally:
        cache.record_past = recorded
        cache.static, cache._slots_mask = False, None
        vars(stand_in).clear()  # it and the functions set on it hold each other, and the cache
        if cache.latest_ids is not None:  # enough to know the conversation by, and no more than the window
            cache.forget_unseen_ids()
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


def _unwrapped(model: Any, name: str = "model") -> PreTrainedModel:
    """The model of transformers that the argument `name` is, or that `torch.compile` or peft put their wrapper around.

    Raises:
        TypeError: there is none, or none that generates.
        ValueError: peft would put learned tokens or keys before the prompt.
    """
    inner = getattr(model, "_orig_mod", model)
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"`{name}` must be a transformers `PreTrainedModel`, got {type(model).__name__}.")
    if not isinstance(inner, transformers.GenerationMixin):
        raise TypeError(
            f"`{name}` must be one that generates, got {type(inner).__name__}, which has no transformers `generate`: "
            "load the model with its language modeling head."
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
    if _setting(model, kwargs, "penalty_alpha"):
        raise ValueError(
            "`penalty_alpha` asks for contrastive search, which looks at all tokens of before. Leave it out."
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


def _assistance(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[str]:
    """The arguments of `generate` that ask for assisted decoding (arXiv:2211.17192)."""
    names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    return [name for name in names if _setting(model, kwargs, name)]


def _refuse_assistance(model: PreTrainedModel, cache: SinkCache, kwargs: dict[str, Any]) -> None:
    """Raise where drafts can't be checked, or taken back, as exactly as one token at a time."""
    name, window = _assistance(model, kwargs)[0], (cache.window_length, cache.num_sink_tokens)
    if name == "use_mtp" or _setting(model, kwargs, "speculation_type") == "dflash":
        raise ValueError(
            f"`{name}` can't be used in a stream: its layers draft from what the model made of all tokens, in a cache "
            "of their own that grows with them. Use `prompt_lookup_num_tokens` or an `assistant_model`."
        )
    if name == "assistant_early_exit" and EARLY_EXITS_FAIL:
        raise ValueError(
            f"`{name}` fails in transformers {transformers.__version__} with any cache: an argument is left out there. "
            "Update transformers, or use `prompt_lookup_num_tokens` or an `assistant_model`."
        )
    if _is_synced(model, kwargs.get("synced_gpus")):
        raise ValueError(
            f"`{name}` can't be used with `synced_gpus`: a rank that is done goes on, and assisted decoding of "
            "transformers has it append tokens. Leave one of them out."
        )
    if not _takes_masks(model):
        raise ValueError(
            f"`{name}` checks several tokens at once, which needs a mask that this model's `attn_implementation`, "
            'flash attention, does not take. Load the model with "sdpa", or leave it out.'
        )
    if not all(_can_record(layer) for layer in SinkCache(*window).bind(model).layers):
        raise ValueError(
            f"`{name}` asks for a decoding mode that takes tokens back, which some layers of `model` "
            f"({type(model).__name__}) can't with transformers {transformers.__version__}: they slide or keep a state. "
            "Leave it out, or use a model with full attention in its layers."
        )
    number = _setting(model, kwargs, "prompt_lookup_num_tokens")
    if number is not None and number >= cache.window_length:
        raise ValueError(
            f"`prompt_lookup_num_tokens` must be less than `window_length` ({cache.window_length}), got {number}."
        )


def _with_its_own_depth(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a configuration of its own for the base model, whose depth an early exit sets while it drafts."""
    prefix = model.base_model_prefix
    lent, base = _stand_in(model), _stand_in(getattr(model, prefix))
    base.config = copy.copy(base.config)
    vars(lent)["_modules"] = {**model._modules, prefix: base}
    return lent


def _drafting(
    assistant: PreTrainedModel, window: Window, lent: Optional[PreTrainedModel] = None, depth: Optional[int] = None
) -> PreTrainedModel:
    """A stand-in for the assistant of assisted decoding that drafts in a stream of its own.

    Its memory is that of one window, and it sees what the model that it assists sees. The model itself is the assistant
    if it is `lent` for early exits: then its first `depth` layers have a stream of their own.
    """
    cache = SinkCache(window.length, window.num_sinks)
    try:
        cache.bind(assistant)
    except ValueError as error:
        raise ValueError(f"`assistant_model` can't draft in a stream of its own. {error}") from error
    if lent is not None:
        cache._keep_layers(depth)
    if not all(_can_record(layer) for layer in cache.layers):
        raise ValueError(
            f"`assistant_model` ({type(assistant).__name__}) can't draft: some of its layers can't take tokens back "
            f"with transformers {transformers.__version__}, as they slide or keep a state. Use another one."
        )
    cache.record_past = True
    stand_in = _stand_in(assistant if lent is None else lent)
    stand_in.generate = functools.partial(_draft, assistant if lent is None else lent, cache)
    return stand_in


def _draft(
    assistant: PreTrainedModel,
    cache: SinkCache,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    attention_mask: Optional[torch.Tensor] = None,
    **kwargs,
) -> Any:
    """What `assistant`, which `cache` is bound to, says after `input_ids` (int64 `[1, tokens]`).

    What it drafted before and the model did not take is known by its tokens, and taken back first.
    """
    length = input_ids.shape[1]
    padded = attention_mask is not None and attention_mask.shape[1] <= length  # else, of another tokenizer's ids
    mask = torch.ones_like(input_ids)  # given none, transformers would take a token that it pads with for padding
    mask[:, : int((attention_mask == 0).sum()) if padded else 0] = 0
    end = min(cache.common_length(input_ids), length - 1)
    if end > max(cache.pads or [0]) and end >= cache.get_seq_length() - cache.num_removable:
        cache.crop(max_length=end)
    else:
        cache.reset()
        cache.record_past = True
    for name in ("past_key_values", "position_ids", "cache_position"):
        kwargs.pop(name, None)
    most = min(max_new_tokens, max(cache.window_length - 1, 1))  # what can be taken back
    if kwargs.get("min_new_tokens") is not None:
        kwargs["min_new_tokens"] = min(kwargs["min_new_tokens"], most)
    kwargs |= dict(input_ids=input_ids, attention_mask=mask, max_new_tokens=most)
    kwargs["generation_config"] = _with(kwargs["generation_config"], **SERVED)
    stand_in = _streaming(assistant, cache, None, prefill_progress=False, synced=False)
    output = _decode(stand_in, type(assistant).generate, cache, kwargs)
    output.past_key_values = None  # transformers would crop it by its own count
    return output


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


def _columns_in_common(cache: SinkCache, kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """How many columns the conversation of a call of `generate` has; how many its ids leave out; and after which of
    those seen it goes on.

    That may be before the last one. An interrupt, or a draft that was not taken, may have left tokens in the cache that
    are not in the conversation, and one of its tokens at least must be new. What can't be taken back counts as common,
    and is refused as other tokens.

    Raises:
        ValueError: what is given of the conversation does not go on where `cache` has got to.
    """
    columns, left_out, start = _columns(kwargs)
    ids, seen = kwargs.get("inputs") if kwargs.get("input_ids") is None else kwargs["input_ids"], cache.get_seq_length()
    end = seen
    if seen > 0 and ids is not None:
        common = min(cache.common_length(ids, left_out), columns - 1)
        if max(cache.pads or [0]) < common and seen - cache.num_removable <= common < seen:
            end = common
    if 0 < columns <= end:
        raise ValueError(
            f"`input_ids` must be the whole conversation, longer than the {seen} tokens that the `SinkCache` in "
            f"`past_key_values` has seen, got {columns}; or only what is new, with the `attention_mask` of all. "
            "Don't crop it to `get_max_cache_shape()`. To start another one, `reset()` it."
        )
    if end < start < columns:
        raise ValueError(
            f"`input_ids` must go on after the {end} tokens that the `SinkCache` has seen, but are the last "
            f"{columns - start} of the {columns} in `attention_mask`: {start - end} are missing. The last token that "
            "was generated has not been seen, so pass it too."
        )
    return columns, left_out, end


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
    """Raise unless `past_key_values` is a `SinkCache`, and with the window that was named."""
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
