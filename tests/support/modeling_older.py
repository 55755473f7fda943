"""A model as public files for older releases of transformers have it: it asks the cache how long it is, and counts.

It crops the mask to what the cache can hold, makes positions of the mask, makes its own causal mask over as many keys
as the cache says to give, and checks that it got as many.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.modeling_backwards import BackwardsForCausalLM


class OlderForCausalLM(BackwardsForCausalLM):
    inverts = False  # whether a mask of four dimensions is taken as 1 for what is seen, and 0 for what is not

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, **kwargs
    ):
        if isinstance(past_key_values, Cache):
            length = past_key_values.get_seq_length()
            seen = past_key_values.seen_tokens if hasattr(past_key_values, "seen_tokens") else length
            most = past_key_values.get_max_cache_shape() if hasattr(past_key_values, "get_max_cache_shape") else None
            if attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
                input_ids = input_ids[:, seen - attention_mask.shape[1] :]
            elif seen < input_ids.shape[1]:
                input_ids = input_ids[:, seen:]
            if most is not None and most > 0 and attention_mask is not None and length + input_ids.shape[1] > most:
                attention_mask = attention_mask[:, -most:]
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return dict(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
        )

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ) -> CausalLMOutputWithPast:
        cache = DynamicCache() if past_key_values is None and use_cache is not False else past_key_values
        (batch, length), past = input_ids.shape, 0
        if cache is not None:
            usable = getattr(cache, "get_usable_length", None)
            past = cache.get_seq_length() if usable is None else usable(length)
        hidden = self.embed_tokens(input_ids)
        mask = self.causal_mask(attention_mask, batch, length, past, hidden)
        return super().forward(input_ids, mask, position_ids, cache, use_cache)

    def causal_mask(self, mask, batch: int, length: int, past: int, hidden: torch.Tensor) -> torch.Tensor:
        least, shape = torch.finfo(hidden.dtype).min, (batch, 1, length, past + length)
        if mask is not None and mask.dim() == 4:
            if tuple(mask.shape) != shape:
                raise ValueError(f"Attention mask should be of size {shape}, but is {tuple(mask.shape)}")
            return (1.0 - mask).masked_fill((1.0 - mask).bool(), least) if self.inverts else mask
        sees = torch.ones(length, past + length, dtype=torch.bool).tril(past)
        if mask is not None:
            if mask.shape[1] != past + length:
                raise ValueError(f"a mask of {mask.shape[1]} columns for {past + length} keys")
            sees = sees & mask[:, None, None].bool()
        return torch.zeros(sees.shape, dtype=hidden.dtype).masked_fill(~sees, least).expand(shape)
