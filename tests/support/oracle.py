"""The oracles: what streaming must give, from neither a cache nor a rotation of this repository's."""

from typing import Optional

import torch
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel

from custom_generate.generate import CACHE
from tests.support.helpers import RELEASE


@torch.no_grad()
def oracle(
    model: PreTrainedModel, tokens: list[int], window_length: int, num_sink_tokens: int, **inputs
) -> torch.Tensor:
    """The logits that streaming `tokens` must give, `[len(tokens), vocab_size]`, from one forward pass without a cache.

    Token `t` sees the first `num_sink_tokens`, directly before the latest `window_length - num_sink_tokens` up to and
    including itself. RoPE knows only differences of positions, so for every distance that the sinks have to move a copy
    of them is appended with `position_ids` moved as far; a copy sees itself only, so its hidden states are the sinks'.
    """
    plan = [max(token - window_length + 1, 0) for token in range(len(tokens))]  # how far the sinks move for each
    moves = sorted({move for move in plan if move}) if num_sink_tokens else []
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    # Where keys are made of several tokens, a copy comes after padding, as the sinks come after nothing.
    gap = 4 if kinds & {"hybrid", "hybrid_sliding"} else 0
    starts = [len(tokens) + gap + number * (gap + num_sink_tokens) for number in range(len(moves))]
    copies = {move: slice(start, start + num_sink_tokens) for move, start in zip(moves, starts)}

    input_ids = torch.tensor(tokens + ([0] * gap + tokens[:num_sink_tokens]) * len(moves))
    length = len(input_ids)
    # What a token is of (the stream, 0, a copy, or padding, -1), its place in that, and its position.
    part, place, position_ids = torch.full([length], -1), torch.arange(length), torch.zeros(length, dtype=torch.long)
    part[: len(tokens)], position_ids[: len(tokens)] = 0, torch.arange(len(tokens))
    for number, (move, copy) in enumerate(copies.items(), start=1):
        part[copy], place[copy] = number, torch.arange(num_sink_tokens)
        position_ids[copy] = torch.arange(num_sink_tokens) + move
    itself = (part[:, None] == part) & (place[:, None] >= place)
    sees = itself.clone()
    for token, move in enumerate(plan):
        if move:
            sees[token, : move + num_sink_tokens] = False
        if move in copies:
            sees[token, copies[move]] = True

    def mask(sees: torch.Tensor) -> torch.Tensor:
        return torch.zeros(sees.shape, dtype=model.dtype).masked_fill_(~sees, torch.finfo(model.dtype).min)[None, None]

    attention_mask, hooks = mask(sees), []
    if len(kinds) > 1 or gap:  # the others see what they would without a sink cache
        attention_mask = {name: attention_mask for name in ("full_attention", "hybrid", "indexed_attention")}
        attention_mask |= {name: (part >= 0)[None].long() if gap else None for name in ("linear_attention", "conv")}
        if getattr(config, "sliding_window", None):
            attention_mask["sliding_attention"] = mask(itself & (place[:, None] - place < config.sliding_window))
        if chunk := getattr(config, "attention_chunk_size", None):
            attention_mask["chunked_attention"] = mask(itself & (place[:, None] // chunk == place // chunk))
        # A layer with a state would go on from the stream's end: each copy is given what came out for the sinks.
        layers = next(
            module
            for module in (*model.get_decoder().modules(), *model.modules())  # a tower may have as many
            if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
        )

        def put_sinks(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            for copy in copies.values():
                states[:, copy] = states[:, :num_sink_tokens]

        hooks = [layer.register_forward_hook(put_sinks) for layer in layers]
    output = model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=attention_mask,
        **({"use_cache": False} | inputs),
    )
    for hook in hooks:
        hook.remove()
    return output.logits[0, : len(tokens)]


class RoundedCache(DynamicCache):
    """Rounds keys and values to 8 bits as they come, as `kv_bits=8` has them: for the oracles.

    Each token's numbers of a head become multiples of their largest magnitude / 127, which is rounded to bfloat16
    first. Keys are rounded as they are at position `p % cycle`.

    Args:
        config: the model's.
        columns: which are rounded. The sinks and their copies are not.
        cycle: of the cache, None if no position reaches it.
        inverse_frequencies: `[pairs]`, of a model that rotates a head's two halves against each other, for a cycle.
        factors: by what channels that stand out are divided before, as `ModelTraits.factors`.
    """

    def __init__(self, config, columns: range, cycle: Optional[int] = None, inverse_frequencies=None, factors=None):
        super().__init__(config=config) if RELEASE >= Version("4.56") else super().__init__()
        self.columns, self.cycle, self.inverse_frequencies, self.factors = columns, cycle, inverse_frequencies, factors
        self.kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        slides = self.kinds is not None and self.kinds[layer_idx] in ("sliding_attention", "chunked_attention")
        if not slides:
            length = key_states.shape[2]
            start = self.get_seq_length(layer_idx) if length == 1 else 0
            columns = torch.arange(start, start + length)
            rounds = (columns >= self.columns.start) & (columns < self.columns.stop)
            away = torch.zeros_like(columns) if self.cycle is None else columns - columns % self.cycle
            factors = {} if self.factors is None else self.factors[layer_idx]
            keys = self._turned(_in_8_bits(self._turned(key_states, -away), factors.get("keys")), away)
            values = _in_8_bits(value_states, factors.get("values"))
            key_states, value_states = (
                torch.where(rounds[:, None], rounded, whole)
                for rounded, whole in ((keys, key_states), (values, value_states))
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _turned(self, keys: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        if self.cycle is None:
            return keys
        angles = distances.double()[:, None] * self.inverse_frequencies.double()
        cos, sin, (first, second) = angles.cos().float(), angles.sin().float(), keys.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _in_8_bits(states: torch.Tensor, factors: Optional[torch.Tensor]) -> torch.Tensor:
    factors = 1 if factors is None else factors[:, None]  # [kv_heads, 1, head_dim]
    states = states / factors
    step = (states.abs().amax(-1, keepdim=True) / 127).bfloat16().float().clamp(min=1e-30)
    return (states / step).round().clamp(-127, 127) * step * factors


@torch.no_grad()
def oracle_in_order(
    model: PreTrainedModel,
    tokens: list[int],
    window_length: int,
    num_sink_tokens: int,
    cache: Optional[DynamicCache] = None,
) -> torch.Tensor:
    """The same for a model that knows the order of tokens by the columns of its cache, as by ALiBi.

    Tokens go one by one into a cache of transformers, out of which the oldest behind the sinks is cut by hand. The mask
    is as long as what is kept.
    """
    cache, logits = DynamicCache() if cache is None else cache, []
    for token in tokens:
        kept = min(len(logits), window_length - 1)
        if len(logits) >= window_length:
            if hasattr(cache, "layers"):
                for layer in cache.layers:
                    layer.keys, layer.values = (
                        _without(states, num_sink_tokens) for states in (layer.keys, layer.values)
                    )
            else:  # until 4.53
                for states in (cache.key_cache, cache.value_cache):
                    states[:] = [_without(each, num_sink_tokens) for each in states]
        assert cache.get_seq_length() == kept
        output = model(
            input_ids=torch.tensor([[token]]),
            attention_mask=torch.ones(1, kept + 1, dtype=torch.long),
            use_cache=True,
            **{CACHE: cache},
        )
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def _without(states: torch.Tensor, column: int) -> torch.Tensor:
    """`states`, `[1, kv_heads, columns, head_dim]`, but for one column."""
    return torch.cat([states[:, :, :column], states[:, :, column + 1 :]], dim=2)


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference of any step: both `[steps, vocab_size]`, compared by their norms."""
    assert logits.shape == expected.shape
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@torch.no_grad()
def oracle_with_images(
    model: PreTrainedModel, input_ids: torch.Tensor, window_length: int, num_sink_tokens: int, **inputs
) -> torch.Tensor:
    """The same for `input_ids` (`[1, length]`) with images: the decoder's inputs of one plain pass are extended.

    The sinks move by how far the oldest recent token is from the first token behind them, in the least of their
    positions over the axes. Where the model's own mask has tokens see later ones, they do here, and where a layer
    slides, later ones see them. Sinks may see later ones too, so copies are given what came out for the sinks.
    """
    embeddings, length = model.get_input_embeddings(), input_ids.shape[1]
    decoder = next(module for module in model.modules() if any(child is embeddings for child in module.children()))
    config, recent = model.config.get_text_config(decoder=True), window_length - num_sink_tokens
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    layers = next(module for module in decoder.children() if isinstance(module, torch.nn.ModuleList))

    def put_sinks(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        for start in range(length, states.shape[1], num_sink_tokens or 1):
            states[:, start : start + num_sink_tokens] = states[:, :num_sink_tokens]

    def extend(module, args, kwargs):
        positions = kwargs.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        least = positions.view(-1, length)[-3:].amin(0).tolist()
        plan = [
            least[token - recent + 1] - least[num_sink_tokens] if token >= window_length else 0
            for token in range(length)
        ]
        moves = sorted({move for move in plan if move}) if num_sink_tokens else []
        starts = {move: length + number * num_sink_tokens for number, move in enumerate(moves)}
        total = length + len(moves) * num_sink_tokens
        part, place = torch.zeros(total, dtype=torch.long), torch.arange(total)
        for number, start in enumerate(starts.values(), start=1):
            part[start : start + num_sink_tokens], place[start : start + num_sink_tokens] = (
                number,
                torch.arange(num_sink_tokens),
            )
        itself = (part[:, None] == part) & (place[:, None] >= place)
        handed = kwargs.get("attention_mask")

        def later(kind: str) -> torch.Tensor:
            mask = handed.get(kind) if isinstance(handed, dict) else handed
            seen = torch.zeros(total, total, dtype=torch.bool)
            if isinstance(mask, torch.Tensor) and mask.dim() == 4:
                seen[:length, :length] = (mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0).triu(1)
            return seen

        def mask(sees: torch.Tensor) -> torch.Tensor:
            return torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[None, None]

        full = itself.clone()
        for token, move in enumerate(plan):
            if token >= window_length:
                full[token, num_sink_tokens : token - recent + 1] = False
                if move:
                    full[token, :num_sink_tokens] = False
            if move in starts:
                full[token, starts[move] : starts[move] + num_sink_tokens] = True
        masks = dict.fromkeys(("full_attention", "indexed_attention"), mask(full | later("full_attention")))
        masks |= dict.fromkeys(("linear_attention", "conv"))
        if "sliding_attention" in kinds:
            near = itself & (place[:, None] - place < config.sliding_window)
            ahead = later("sliding_attention")
            masks["sliding_attention"] = mask(near | ahead | ahead.T)
        states, marks = kwargs["inputs_embeds"], kwargs.get("visual_pos_masks")
        copies = [states[:, :num_sink_tokens]] * len(moves)
        changed = dict(inputs_embeds=torch.cat([states, *copies], dim=1))
        changed["position_ids"] = torch.cat(
            [positions, *(positions[..., :num_sink_tokens] + move for move in moves)], dim=-1
        )
        changed["attention_mask"] = masks if len(kinds) > 1 else masks["full_attention"]
        if marks is not None:
            changed["visual_pos_masks"] = torch.cat([marks] + [marks[:, :num_sink_tokens]] * len(moves), dim=1)
            number = int(marks[:, :num_sink_tokens].sum())
            changed["deepstack_visual_embeds"] = [
                torch.cat([entries] + [entries[:number]] * len(moves)) for entries in kwargs["deepstack_visual_embeds"]
            ]
        if kwargs.get("per_layer_inputs") is not None:
            own = kwargs["per_layer_inputs"]
            changed["per_layer_inputs"] = torch.cat([own] + [own[:, :num_sink_tokens]] * len(moves), dim=1)
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = torch.arange(total)
        return args, kwargs | changed

    hooks = [decoder.register_forward_pre_hook(extend, with_kwargs=True)]
    hooks += [layer.register_forward_hook(put_sinks) for layer in layers]
    try:
        return model(input_ids=input_ids, **({"use_cache": False} | inputs)).logits[0, :length]
    finally:
        for hook in hooks:
            hook.remove()
