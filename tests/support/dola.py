"""A repository of DoLa (arXiv:2309.03883), such as transformers has moved it to: on the Hub by a test."""

import torch
from transformers import GenerationMixin


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_decode, **kwargs)


def _decode(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_kwargs):
    """Contrasts the last layer with the first. Returns ids and the last layer's logits, `[1, steps, vocab_size]`."""
    name, logits = "cache" if "cache" in model_kwargs else "past_key_values", []
    cache = model_kwargs[name]
    while not stopping_criteria(input_ids, None).all():
        inputs = {"input_ids": input_ids[:, cache.get_seq_length() :], name: cache}
        output = model(**inputs, output_hidden_states=True, return_dict=True)
        early = model.lm_head(output.hidden_states[1][:, -1])
        logits.append(output.logits[:, -1])
        token = (logits[-1].log_softmax(-1) - early.log_softmax(-1)).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    return input_ids, torch.stack(logits, dim=1)
