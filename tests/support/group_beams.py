"""A repository of group beam search (arXiv:1610.02424), such as transformers has moved it to: on the Hub by a test."""

import torch
from transformers import GenerationMixin


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_search, **kwargs)


def _search(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_kwargs):
    """Two groups of beams. Returns those of the first, `[beams, length]`, and the logarithms of their probabilities."""
    name = "cache" if "cache" in model_kwargs else "past_key_values"
    cache, size = model_kwargs[name], len(input_ids) // 2
    scores = torch.full((2, size), -torch.inf)
    scores[:, 0] = 0  # all beams begin alike
    if hasattr(model, "_get_initial_cache_position"):
        model_kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, model_kwargs)
    while not stopping_criteria(input_ids, None).all():
        inputs = model.prepare_inputs_for_generation(input_ids[:, cache.get_seq_length() :], **model_kwargs)
        output = model(**inputs, return_dict=True)
        beams, tokens, chosen = [], [], torch.zeros(model.config.vocab_size)
        for group, logits in enumerate(output.logits[:, -1].log_softmax(-1).split(size)):
            sums = scores[group][:, None] + logits
            best = (sums - 0.5 * chosen).flatten().topk(size).indices
            scores[group] = sums.flatten()[best]
            beams.append(best // len(chosen) + group * size)
            tokens.append(best % len(chosen))
            chosen[tokens[-1]] += 1
        beams = torch.cat(beams)
        input_ids = torch.cat([input_ids[beams], torch.cat(tokens)[:, None]], dim=1)
        model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs)
        cache.reorder_cache(beams)
    return input_ids[:size], scores[0]
