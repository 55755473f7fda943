"""A model as its author would put it on the Hub, with code of its own: no attention or rotary module of transformers.

Its heads turn their last `rotary_dim` dimensions only, as pairs of neighbours, and backwards.
"""

from typing import Optional

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class BackwardsConfig(PretrainedConfig):
    model_type = "backwards"

    def __init__(
        self,
        vocab_size=211,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        max_position_embeddings=512,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.rotary_dim, self.max_position_embeddings = head_dim, rotary_dim, max_position_embeddings
        super().__init__(**{"pad_token_id": 0, "tie_word_embeddings": False, **kwargs})


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = 2 * cos.shape[-1]
    still, turning = states[..., :-rotary_dim], states[..., -rotary_dim:]
    first, second = turning[..., 0::2], turning[..., 1::2]
    pairs = (first * cos + second * sin, second * cos - first * sin)
    return torch.cat([still, torch.stack(pairs, dim=-1).flatten(-2)], dim=-1)


def additive(attention_mask: Optional[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    """What to add to `scores`, `[batch, heads, length, keys]`: a mask made already, or one over the latest keys."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    length, keys = scores.shape[-2:]
    sees = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)
    if attention_mask is not None:
        sees = sees & attention_mask[:, None, None, -keys:].bool()
    return torch.zeros(sees.shape, dtype=scores.dtype).masked_fill(~sees, torch.finfo(scores.dtype).min)


class BackwardsLayer(nn.Module):
    def __init__(self, config: BackwardsConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(config.hidden_size, 96), nn.GELU(), nn.Linear(96, config.hidden_size))

    def forward(self, hidden, cos, sin, attention_mask, past_key_values):
        batch, length, _ = hidden.shape
        states = self.norm(hidden)
        queries, keys, values = (
            projection(states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = turned(queries, cos, sin), turned(keys, cos, sin)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx, {"sin": sin, "cos": cos})
        keys, values = (states.repeat_interleave(self.groups, dim=1) for states in (keys, values))
        scores = queries @ keys.transpose(2, 3) / self.head_dim**0.5
        attended = (scores + additive(attention_mask, scores)).softmax(dim=-1) @ values
        hidden = hidden + self.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(hidden)


class BackwardsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BackwardsConfig
    base_model_prefix = "model"
    _supports_cache_class = True  # asked for until 4.55

    def __init__(self, config: BackwardsConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BackwardsLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Saved with the weights: from 5.0 a model is made on the meta device, and what isn't loaded stays there.
        self.register_buffer("inv_freq", 100.0 ** -torch.arange(0, 1, 2 / config.rotary_dim))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ) -> CausalLMOutputWithPast:
        if past_key_values is None and use_cache is not False:
            past_key_values = DynamicCache()
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        hidden = self.embed_tokens(input_ids)
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attention_mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(self.norm(hidden)), past_key_values=past_key_values)
