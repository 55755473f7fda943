"""The oracles: what streaming must give, from neither a cache nor a rotation of this repository's."""

import torch
from transformers import DynamicCache, PreTrainedModel


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
            for module in model.modules()
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
        use_cache=False,
        **inputs,
    )
    for hook in hooks:
        hook.remove()
    return output.logits[0, : len(tokens)]


@torch.no_grad()
def oracle_in_order(
    model: PreTrainedModel, tokens: list[int], window_length: int, num_sink_tokens: int
) -> torch.Tensor:
    """The same for a model that knows the order of tokens by the columns of its cache, as by ALiBi.

    Tokens go one by one into a cache of transformers, out of which the oldest behind the sinks is cut by hand. The mask
    is as long as what is kept.
    """
    cache, logits = DynamicCache(), []
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
            past_key_values=cache,
            use_cache=True,
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
