"""An image for any of the tiny models of `tools.architectures`, and a conversation with two of them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from custom_generate.generate import SinkCache, generate
from tests.support.helpers import prompt
from tests.support.oracle import difference, oracle_with_images

PLACEHOLDERS = range(201, 211)  # ids that stand for something else than text, besides 0 and 1
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The value of the first of these settings that `config` has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _side(value: Any) -> int:
    """A size as a number, of which some configurations have two or three."""
    return value if isinstance(value, int) else value[-1]


def an_image(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """What the model's forward takes of one random image, by name, of a few tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    config, names = model.config, inspect.signature(model.forward).parameters
    vision = _first(config, "vision_config", "vq_config", default=config)
    channels = _first(vision, "in_channels", "in_chans", "num_channels", "image_channels", default=3)
    patch = _side(_first(vision, "patch_size", default=14))
    if config.model_type in IMAGES:
        return IMAGES[config.model_type](noise, patch)
    merge = _side(_first(vision, "spatial_merge_size", "merge_size", default=getattr(config, "spatial_merge_size", 2)))
    if "image_grid_thw" in names:  # patches in a row
        depth = _side(_first(vision, "temporal_patch_size", "patch_temporal", default=1))
        patches = noise((2 * merge) ** 2, channels * depth * patch**2)
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2 * merge, 2 * merge]])}
        return image | ({"image_merge_sizes": torch.tensor([merge])} if "image_merge_sizes" in names else {})
    if "spatial_shapes" in names:
        ones = torch.ones(1, 16, dtype=torch.long)
        shapes = torch.tensor([[4, 4]])
        patches = noise(1, 16, channels * patch**2)
        return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": ones}
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        return {"pixel_values": noise(1, 16, channels * patch**2), "image_position_ids": places}
    if "target_sizes" in names:  # patches beside each other
        return {"pixel_values": noise(1, channels, patch, 64 * patch), "target_sizes": torch.tensor([[8, 8]])}
    size = _side(_first(vision, "image_size", "resolution", default=2 * patch))
    takes = inspect.signature(getattr(model, "get_image_features", model.forward)).parameters
    image = {}
    if "image_sizes" in takes:
        size = size if hasattr(config, "image_grid_pinpoints") else 2 * merge * patch
        image = {"image_sizes": torch.tensor([[size, size]])}
    tiles = (1, 2) if hasattr(config, "image_grid_pinpoints") else (1, 1) if "pixel_attention_mask" in names else (1,)
    image["pixel_values"] = noise(*tiles, channels, size, size)
    if "high_res_pixel_values" in names:
        size = config.high_res_vision_config.image_size
        image["high_res_pixel_values"] = noise(1, channels, size, size)
    return image


# By type, an image where it is not made as above, of noise and the size of a patch.
IMAGES: dict[str, Callable[[Callable, int], dict[str, torch.Tensor]]] = {
    "fuyu": lambda noise, patch: {"pixel_values": noise(1, 4, 3 * patch**2)},
    "granite_docling": lambda noise, patch: {
        "pixel_values": noise(1, 1, 3, 56, 56),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    },
    "gemma4_unified": lambda noise, patch: {
        "pixel_values": noise(1, 4, 3 * (2 * patch) ** 2),
        "image_position_ids": torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]]),
    },
    "molmo2": lambda noise, patch: {
        "pixel_values": noise(1, 4, 3 * patch**2),
        "image_token_pooling": torch.tensor([[0, 1], [2, 3]]),
        "image_grids": torch.tensor([[1, 1, 1, 1]]),
        "image_num_crops": torch.tensor([1]),
    },
    "kimi_k25": lambda noise, patch: {
        "pixel_values": noise(16, 3, patch, patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "nemotron_h_omni": lambda noise, patch: {
        "pixel_values": noise(16, 3 * patch**2),
        "image_grid_hw": torch.tensor([[4, 4]]),
    },
}
IMAGES["paddleocr_vl"] = IMAGES["kimi_k25"]


def _with_features(model: PreTrainedModel) -> Any:
    """The part of `model` that makes features of images."""
    parts = [module for module in model.modules() if hasattr(module, "get_image_features")]
    return parts[1] if len(parts) > 1 else parts[0]  # the first hands all on to the second


def placeholder(model: PreTrainedModel) -> int:
    """The id of the tokens in whose place an image's features come."""
    return _first(model.config, "image_token_id", "image_token_index", "image_patch_id")


@torch.no_grad()
def features(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> int:
    """How many tokens an image has: as many as the model's own tower makes features of it."""
    output = _with_features(model).get_image_features(**image)
    found = _first(output, "pooler_output", "last_hidden_state", default=output)
    if getattr(output, "deepstack_features", None) and getattr(output, "pooler_output", None) is None:
        found = output.deepstack_features[0][1]  # each with the layer that gets them
    found = found if isinstance(found, (list, tuple)) else [found]
    return sum(entries[..., 0].numel() for entries in found)


def joined(images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several images as one input."""
    side_by_side = {"pixel_values"} if "target_sizes" in images[0] else ()
    return {
        name: torch.cat([image[name] for image in images], dim=-1 if name in side_by_side else 0) for name in images[0]
    }


def types_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The types of these tokens, as processors give them."""
    names = inspect.signature(model.forward).parameters
    return {name: (ids == placeholder(model)).long() for name in TOKEN_TYPES if name in names}


def text(length: int, seed: int = 0) -> torch.Tensor:
    """Tokens that stand for no image: `[1, length]`."""
    return prompt(length, seed=seed).clamp(2, PLACEHOLDERS.start - 1)


def stream_images(model: PreTrainedModel, reference: PreTrainedModel, cache: SinkCache) -> float:
    """The largest difference of any step from the oracle, in a conversation of two turns with an image each.

    The first image is among the sinks, and the prompt longer than the window. The second follows what has left it.

    Args:
        model: what is streamed.
        reference: the same with more positions, for the oracle.

    Raises:
        ValueError: the model makes nothing of its images.
    """
    images = [an_image(model, seed) for seed in (1, 2)]
    tokens = torch.full((1, features(model, images[0])), placeholder(model))
    said, steps = torch.cat([text(2), tokens, text(14)], dim=1), []
    for turn, chunk_size in enumerate((3, None), start=1):
        given = joined(images[:turn]) | types_of(model, said)
        output = generate(
            model,
            input_ids=said,
            cache=cache,
            prefill_chunk_size=chunk_size,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            suppress_tokens=[0, 1, *PLACEHOLDERS],
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
        steps.append((said.shape[1], torch.cat(output.logits)))
        if turn == 1:
            said = torch.cat([output.sequences, text(2, seed=1), tokens, text(2, seed=2)], dim=1)
    ids = output.sequences
    expected = oracle_with_images(
        reference, ids, cache.window_length, cache.num_sink_tokens, **joined(images), **types_of(model, ids)
    )
    first = ids[:, : steps[0][0]]
    with torch.no_grad():
        other = reference(input_ids=first, **images[1], **types_of(model, first)).logits[0]
    if difference(other[-1:], expected[first.shape[1] - 1 : first.shape[1]]) < 1e-3:
        raise ValueError("its images make no difference")
    return max(difference(logits, expected[start - 1 : start + 5]) for start, logits in steps)
