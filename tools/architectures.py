"""Try every decoder that transformers knows, and write COMPATIBILITY.md: `make architectures`.

Each model type of `AutoModelForCausalLM` is built tiny and random, streamed past its window by `generate`, and compared
with the oracle of the tests. Each of `AutoModelForImageTextToText` is too, and then with images. Types given as
arguments are tried and printed, and nothing is written.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import gc
import multiprocessing
import re
import signal
import string
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

from custom_generate.generate import OrderedLayer, SinkCache, SinkLayer, generate, read_model
from tests.support.helpers import prompt, seeded
from tests.support.oracle import difference, oracle, oracle_in_order
from tools.images import stream_images
from tools.published import PUBLISHED, Settings

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "COMPATIBILITY.md"
SECONDS = 60  # for one model type
TOLERANCE = 3e-5  # in float32 a stream differs by 1e-5 at most, and one whose keys are not turned by 5e-3 at least
WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4
TURNS = [(3, 16), (24, 12)]  # of how many tokens a prompt is in each, and an answer
CEILING, LONG_ENOUGH = 24, 512  # below which positions are kept, and to what length a model is trained

# ---------------------------------------------------------------------------------------------------------------------
# Building a type: its own configuration, made small
# ---------------------------------------------------------------------------------------------------------------------

# How many layers there are: two, or two of each kind where one of the second says that they differ. A tower has four.
LAYERS = r"((num|n|en|de)_?)?((en|de)coder_)?(num_)?(hidden_)?(layers?|blocks)(_per_stack)?|depth|.*num_hidden_layers"
MIXED = r".*_(period|interval|pattern|offset)|.*every_n_layers|layer_group_size|num_(kv_shared|global|lstm)_layers"
MIXED += r"|.*layers?_(indices|ids|idx|types?|map)|block_types|.*_layers_block_type"
# What an integer of a configuration becomes, at most, by its name: the first pattern that matches all of it decides.
SIZES = {
    r"(?!decoder).*(start|begin|boi|boa).*token_(id|index)": 209,
    r".*(end|eoi|eoa).*token_(id|index)": 208,
    r"(video|audio).*token_(id|index)": 207,
    r".*token_(id|index)|(unk|mask)_index": 1,
    r".*vocab_size.*|.*_vocab": 211,
    r"num_kv_shared_layers|num_(global|lstm)_layers": 2,
    r"first_k_dense_replace|num_dense_layers|max_window_layers|num_res_blocks": 1,
    r".*_(period|interval|pattern)|.*every_n_layers|layer_group_size": 2,
    r".*_offset": 1,
    LAYERS: 4,  # or 2, by `small`
    r"index_n_heads": 32,  # with few, scores of an index are often 0, and its choice is by chance
    r"index_topk": 8,
    r".*(num_key_value_heads|kv_n_heads|num_kv_heads)": 2,
    r".*(n_heads?|(attention|decoder|encoder|num|key|value)_heads)": 4,
    r"qk_(nope|rope)_head_dim|rotary_dim": 8,
    r".*(head_dim|d_head|d_kv|dim_head|kv_channels|attention_head_size|rank|state|state_size)": 16,
    r".*(experts|expert_num)": 4,
    r".*(experts_per_tok|top_?k(_experts)?|moe_k)": 2,
    r".*groups?": 1,
    r".*(hidden_size.*|d_model|dim_model|n_embd|(emb|embed|embedding)_(dim|size)|_dim|lru_width|adapter_.*_size)": 64,
    r".*(intermediate_size.*|ffn.*(dim|size)|d_ff|dff|dim_ff|d_inner|mlp_dim)": 64,
    r".*image_size": 28,
    r".*patch_size": 14,
    r"(mamba_)?chunk_size": 16,  # what states are computed by, however short a text is
    r".*(channels?|num_filters)": 32,
}
POSITIONS = r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(source|target)_positions|context_length"
WINDOWS = r"(sliding|attention)_window(_size)?|window_size|local_attention.*|attention_chunk_size"

COMMON_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}
# Some configurations leave these None, which their models can't use.
NEVER_NONE = {"head_dim": 16, "num_key_value_heads": 2}

MINIMAX_M3 = {"num_hidden_layers": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
# By type, what its configuration needs besides smaller sizes, and why.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # The default layers are all alike, and those of released models are not.
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n": {  # ids of images and sounds begin behind those of text
        "vision_config": {"vocab_offset": 211},
        "audio_config": {"vocab_offset": 339},
        "text_config": {"initializer_range": 0.03},
    },
    "gemma4_text": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 32},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "laguna": {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "mellum": {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "minimax_m3_vl_text": MINIMAX_M3,
    "minimax_m3_vl": {"text_config": MINIMAX_M3},
    # The defaults lack what the model asks for.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "qwen4_exp_text": dict.fromkeys(("head_dim", "indexer_head_dim"), 16)
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 512, "indexer_compress_ratio": 4},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "blenderbot": {"encoder_layers": 4},  # by which transformers counts the layers of the cache
    "xmod": {"default_language": "en_XX"},
    # Time steps, which transformers holds above this for several tokens and not for one.
    "nemotron_h": {"time_step_min": 1e-6},
    "zamba2": {"time_step_min": 1e-6},
    # The layers are so many, and so sharp, that rounding would grow in them.
    "gemma3n_text": {"initializer_range": 0.03},
    # Sizes that are no fields of the configuration.
    "dots3_note_text": dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4)
    | dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim", "swa_v_head_dim"), 16)
    | {"swa_qk_nope_head_dim": 8},
    # Towers for images, whose sizes must fit together or with so small an image.
    "apertus1p5": {
        "image_token_offset": 100,
        "audio_token_offset": 108,
        "vision_config": {"codebook_size": 8},
        "audio_config": {"model_type": "wavtokenizer_encoder", "codebook_size": 8},
    },
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 1} | {f"IMGIMG{chr(65 + code)}Z": 100 + code for code in range(8)}},
    "chameleon_vqgan": {"num_embeddings": 8, "resolution": 32},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "emu3": {
        "vocabulary_map": {"<image>": 1, "<|extra_200|>": 2}
        | {f"<|visual token {code:06}|>": 100 + code for code in range(8)}
    },
    "emu3_vqgan": {"codebook_size": 8, "hidden_size": 128},
    "exaone4_5_vision": {"window_size": 112},
    "florence_vision": {"embed_dim": [64] * 4, "depths": [1] * 4, "num_heads": [4] * 4, "num_groups": [4] * 4},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "gemma4_unified_vision": {"output_proj_dims": 64, "patch_size": 4, "pooling_kernel_size": 2, "mm_posemb_size": 64},
    "gemma4_vision": {"global_head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64},
    "glm5_next_text": {"index_topk": 16},
    "granite4_vision": {"image_grid_pinpoints": [[28, 28]], "deepstack_layer_map": [[-2, 0], [-1, 2]]}
    | {"downsample_rate": "1/2", "spatial_target_layers": [1]},
    "granite_docling_vision": {"image_size": 56, "scale_factor": 2},
    "hunyuan_vl_text": {"rope_parameters": dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2, 2])},
    "internvl_vision": {"image_size": [56, 56]},
    "llava_next": {"image_grid_pinpoints": [[28, 28]]},
    "llava_next_video": {"image_grid_pinpoints": [[28, 28]]},
    "llava_onevision": {"image_grid_pinpoints": [[28, 28]]},
    "minicpm_ocr": {"image_token_id": 1},
    "minicpmv4_6": {"image_token_id": 1},
    "minicpmv4_7": {"image_token_id": 1},
    "molmo2": {"image_patch_id": 1},
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "nemotron_h_omni": {"image_token_id": 1},
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"num_hidden_layers": 4, "out_hidden_size": 64, "hidden_sizes": [64] * 4, "depths": [1] * 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "paddleocr_vl_text": {"rope_parameters": dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])},
    "qianfan_ocr_vision": {"image_size": [56, 56]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 209},
    "qwen2_5_omni_vision_encoder": {"window_size": 112},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 209},
    "radio": {"video_temporal_patch_size": 2},
    "qwen2_5_vl_vision": {"window_size": 112},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 12},
    "vipllava": {"vision_feature_layers": [-2, 1]},
    # Sizes that must fit together.
    "gemma4_assistant": {
        "text_config": dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers"), 4)
        | dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds": False},
}


# Text goes by their towers for images and sounds, which need libraries that are not installed here.
WITHOUT_TOWERS = {"gemma3n"}
# All layers read keys of another model. transformers looks for the one among them that makes these, and fails.
WITHOUT_KEYS = {"gemma4_assistant"}


# Why types are tried with text alone.
NO_IMAGES = {
    "evolla": "It takes proteins, which were not tried.",
    "mistral4": "It takes none.",
    "mllama": "Layers of their own attend to them. They were not tried.",
    **dict.fromkeys(
        sorted(WITHOUT_TOWERS), "Its tower for images needs timm, which the sweep is run without. They were not tried."
    ),
}


def small(config: PreTrainedConfig, length: int, exceptions: dict[str, Any]) -> PreTrainedConfig:
    """`config` with as few and small layers as still have all of its kinds, trained to `length` tokens."""
    exceptions = {**EXCEPTIONS.get(config.model_type, {}), **exceptions}
    depth = getattr(config, "num_hidden_layers", None)
    # A window of its own slides within the stream; where all layers slide, the cache's must fit into it.
    window = 12 if len(set(getattr(config, "layer_types", None) or [])) > 1 else 20
    fields = {field.name for field in dataclasses.fields(config)}
    alike = "vocab_size" in fields and not any(re.fullmatch(MIXED, name) for name in fields | set(exceptions))

    def size(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if re.fullmatch(POSITIONS, name):
            return length
        if re.fullmatch(WINDOWS, name):
            return window
        if alike and re.fullmatch(LAYERS, name):
            return min(value, 2)
        return next((min(value, size) for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)

    settings: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
    if hasattr(config, "initializer_range"):  # so that attention weighs in, and a key turned wrongly can't hide
        settings["initializer_range"] = 0.1
    per_layer: dict[str, list] = {}
    for field in dataclasses.fields(config):
        # Not by `getattr`, which refuses what differs between layers.
        name, value = field.name, vars(config).get(config.attribute_map.get(field.name, field.name))
        if name in COMMON_FIELDS or name in settings:
            continue
        if isinstance(value, PreTrainedConfig):
            settings[name] = small(value, length, exceptions.pop(name, {}))
        elif isinstance(value, (list, tuple)) and depth and depth == len(value) and not _are_places(value):
            per_layer[name] = [size(name, entry) for entry in value]
        elif name in NEVER_NONE and value is None:
            settings[name] = NEVER_NONE[name]
        elif isinstance(field.default, int) and value is not None:  # a default of None is derived from the others
            same = name.endswith("key_value_heads") and value == vars(config).get("num_attention_heads")
            settings[name] = 4 if same else size(name, value)
    if hasattr(config, "is_decoder"):
        settings["is_decoder"] = True
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        head_dim = settings.get("qk_rope_head_dim") or settings.get("head_dim") or 16
        settings["rope_parameters"] = _with_axes(config.rope_parameters or {}, head_dim)
    if "num_hidden_layers" in exceptions:  # then the layers are those that it names
        settings |= per_layer
    elif per_layer:
        kinds = [str(kind) for kind in zip(*per_layer.values())]
        first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        layers = first * 2
        settings |= {name: [values[layer] for layer in layers] for name, values in per_layer.items()}
        settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config)(**{**settings, **exceptions})


def _with_axes(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """`rope` for positions on three axes, each of which turns some pairs of so small a head."""
    if rope and all(isinstance(value, dict) for value in rope.values()):  # for each kind of layers
        return {kind: _with_axes(value, head_dim) for kind, value in rope.items()}
    partial = max(rope.get("partial_rotary_factor", 1.0), 0.5)
    pairs = int(head_dim * partial) // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0} | rope | {"partial_rotary_factor": partial}
    return rope | {"mrope_section": [pairs * 3 // 8, pairs * 3 // 8, pairs - 2 * (pairs * 3 // 8)]}


def _are_places(values: Any) -> bool:
    """Whether `values` are the indices of some layers, rather than something of each layer."""
    return all(isinstance(value, int) for value in values) and list(values) == sorted(set(values))


def build(model_type: str, length: int, settings: Settings, types: dict[str, str] = MODEL_TYPES) -> PreTrainedModel:
    """A tiny random model trained to `length` tokens: one with the same weights whatever the length."""
    settings = settings(length) if callable(settings) else settings
    config = CONFIG_MAPPING[model_type](**{**EXCEPTIONS.get(model_type, {}), **settings})
    config = small(config, length, settings)
    if model_type in WITHOUT_KEYS:
        config.text_config.num_kv_shared_layers = 0
    model_class = getattr(transformers, {**WITH_IMAGES, **MODEL_TYPES, **types}[model_type])
    if model_class.config_class is not type(config):  # the decoder of a larger model has a configuration of its own
        parts = (part for part in vars(config).values() if type(part) is model_class.config_class)
        config = next(parts, config)
    towers = mock.patch.object(transformers.AutoModel, "from_config", _text_only(transformers.AutoModel.from_config))
    with seeded(), towers if model_type in WITHOUT_TOWERS else contextlib.nullcontext():
        model = model_class._from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if not parameter.any():  # what is learned from nothing, as some norms are, would hide what it multiplies
                parameter.data.normal_(std=0.1)
    return model


def _text_only(from_config: Callable) -> Callable:
    """`AutoModel.from_config`, which leaves out towers for images and sounds."""

    def make(config: PreTrainedConfig, **kwargs) -> torch.nn.Module:
        kind = type(config).__name__
        return torch.nn.Identity() if "Vision" in kind or "Audio" in kind else from_config(config, **kwargs)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Trying a type
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What was found about one model type, or one of `PUBLISHED`: a row of a table."""

    model_type: str
    verdict: str
    layers: str = ""
    rotation: str = ""
    images: str = ""  # what is found with images, of a type that streams text
    of_images: bool = False  # whether the type was tried as one of images and text

    @property
    def wrong(self) -> bool:
        """Whether something here, or in transformers, is to be repaired."""
        unbuilt = self.verdict.startswith("not built") and self.model_type in PUBLISHED
        return unbuilt or self.verdict.startswith(("wrong", "fails")) or self.images.startswith(("wrong", "fails"))


def attempt(task: tuple[str, bool]) -> Row:
    """Build, stream and compare one model type, or one of `PUBLISHED`, within its time.

    Args:
        task: its name, and whether to try it as a model of images and text.
    """
    return dataclasses.replace(_attempt(*task), of_images=task[1])


def _attempt(name: str, of_images: bool) -> Row:
    model_type, settings = PUBLISHED.get(name, (name, {}))
    types = WITH_IMAGES if of_images else MODEL_TYPES

    @functools.cache
    def reference() -> PreTrainedModel:
        """The same model, if it depends on its length then trained to one of which the stream knows nothing."""
        if not callable(settings):
            return model
        reference = build(model_type, LONG_ENOUGH, settings, types)
        shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
        weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.shape == shapes.get(name)}
        reference.load_state_dict(weights, strict=False)  # a table of positions has other random numbers follow
        return reference

    def out_of_time(*_) -> None:
        raise TimeoutError(f"it took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        try:
            model = build(model_type, CEILING if callable(settings) else LONG_ENOUGH, settings, types)
        except Exception as error:
            return Row(name, f"not built: {_first_line(error).split('. ')[0]}")
        try:
            return _stream(name, model, reference, of_images)
        except Exception as error:
            return Row(name, f"fails: {type(error).__name__}: {_first_line(error)}", _layers(model, []))
    finally:
        signal.alarm(0)


def _images(model: PreTrainedModel, reference: Callable[[], PreTrainedModel]) -> str:
    """What is found with images: `streams`, or why it does not."""
    if model.config.model_type in NO_IMAGES:
        return f"not tried: {NO_IMAGES[model.config.model_type]}"
    try:
        cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS).bind(model)
        lower_ceiling(cache)
        difference = stream_images(model, reference(), cache)
    except Exception as error:
        if isinstance(error, ValueError) and "stream" in str(error):
            return f"refused: {_reason(error)}"
        return f"fails: {type(error).__name__}: {_first_line(error)}"
    return "streams" if difference < TOLERANCE else f"wrong: {difference:.1e}"


def _stream(name: str, model: PreTrainedModel, reference: Callable[[], PreTrainedModel], of_images: bool) -> Row:
    """Stream `model`, and compare with what `reference`, the same with more positions, gives without a cache."""
    cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    try:
        difference = _difference(model, reference, cache)
    except (ValueError, TypeError) as error:
        if cache.get_seq_length() > 0:  # too late for a refusal
            raise
        return Row(name, f"refused: {_reason(error)}", _layers(model, []))
    images = _images(model, reference) if of_images else ""
    verdict = "streams" if difference < TOLERANCE else f"wrong: {difference:.1e}"
    return Row(name, verdict, _layers(model, cache.layers), _rotation(model, cache.layers), images)


def lower_ceiling(cache: SinkCache) -> None:
    """Keep positions below `CEILING`, as if the model were trained to no more, where they do not stay lower anyway.

    Raises:
        RuntimeError: the length that the model is trained to was not found.
    """
    if any(isinstance(layer, OrderedLayer) for layer in cache.layers):
        return  # whose positions are columns
    if cache.held.ceiling > LONG_ENOUGH:
        raise RuntimeError(f"positions up to {cache.held.ceiling} go to a model trained to {LONG_ENOUGH}")
    cache.held.ceiling = min(cache.held.ceiling, CEILING)


def _difference(model: PreTrainedModel, reference: Callable[[], PreTrainedModel], cache: SinkCache) -> float:
    """The largest difference of any step from the oracle, in a conversation of `TURNS`.

    In the first the window fills token by token. The prompt of the second is longer than what it holds, and goes in by
    several tokens at a time, while positions are shifted back to stay below the ceiling, as they are in the answer.
    """
    said, steps, logits = torch.empty(1, 0, dtype=torch.long), [], []
    for length, new_tokens in TURNS:
        said = torch.cat([said, prompt(length)], dim=1)
        with seeded():  # sampled, so that the stream never settles into a loop
            output = generate(
                model,
                input_ids=said,
                cache=cache,
                use_cache=True,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                suppress_tokens=[0, 1],  # padding, and what stands for an image in models that take one
                return_dict_in_generate=True,
                output_logits=True,
            )
        steps += range(said.shape[1] - 1, output.sequences.shape[1] - 1)
        logits += output.logits
        said = output.sequences
        lower_ceiling(cache)
    ordered = any(isinstance(layer, OrderedLayer) for layer in cache.layers)
    if not ordered and cache.get_seq_length() - min(cache.held.offsets) > CEILING:
        raise RuntimeError(f"positions passed {CEILING}")
    its_oracle = oracle_in_order if ordered else oracle
    expected = its_oracle(reference(), said[0].tolist(), WINDOW_LENGTH, NUM_SINK_TOKENS)
    return difference(torch.cat(logits), expected[steps])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


def _reason(error: Exception) -> str:
    """What of a refusal's message is about the kind of model, rather than about this one."""
    reason = re.sub(r"^`model` \(\w+\) (can't be streamed: )?", "", _first_line(error))
    # The sentences after the first have figures, which differ between machines, and advice.
    return reason.split(". ")[0].rstrip(".")


def _kinds(model: PreTrainedModel, layers: list) -> list[str]:
    """What each layer is, in a word or two: what the configuration calls it, or what a cache had to do for it."""
    config = model.config.get_text_config(decoder=True)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    unnamed = ["sliding_attention" if slides else "full_attention"] * len(layers)
    kinds = list(getattr(config, "layer_types", None) or unnamed)
    kinds = [kind.removesuffix("_attention").replace("_", " ") for kind in kinds]
    for index, layer in enumerate(layers):
        if not getattr(layer, "is_initialized", True):
            kinds[index] = "unused"
        elif isinstance(layer, OrderedLayer):
            kinds[index] = f"ordered {kinds[index]}".removesuffix(" full")
        elif isinstance(layer, SinkLayer) and layer.ring.rotation is None:
            kinds[index] = f"position-free {kinds[index]}".removesuffix(" full")
    return kinds


def _layers(model: PreTrainedModel, layers: list) -> str:
    """How many layers of each kind mix tokens."""
    counts = collections.Counter(_kinds(model, layers))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind not in ("mlp", "moe"))


def _rotation(model: PreTrainedModel, layers: list) -> str:
    """How the keys of the layers turn; for each kind, where kinds differ."""
    found: dict[str, list[str]] = {}
    for kind, layer, (rotation, _) in zip(_kinds(model, layers), layers, read_model(model).rotations):
        if rotation is not None:
            head_dim = getattr(layer, rotation.tensor).shape[-1]
            text = f"{rotation.tensor}, {'interleaved' if rotation.interleaved else 'half'}"
            text += f", {2 * rotation.frequencies.numel()} of {head_dim}"
            text += f" from {rotation.start}" if rotation.start else ""
            text += ", backwards" if rotation.frequencies.sum() < 0 else ""
            found.setdefault(text, []).append(kind)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{' and '.join(dict.fromkeys(kinds))}: {text}" for text, kinds in found.items())


# ---------------------------------------------------------------------------------------------------------------------
# All types, and what is written
# ---------------------------------------------------------------------------------------------------------------------

REPORT_TEXT = """\
# Compatibility

What `generate` does with each of the {total} model types that transformers {version} knows as causal language models:
**{streams} stream, and {refused} are refused** before the first token{not_built}. Written by `make architectures`;
`python -m tools.architectures TYPE ...` tries single types.

Each type is built by its own classes, tiny and with random weights, with layers of each kind that it has by default.

## These stream

All logits, in float32, are those of one forward pass without a cache over what a stream keeps. That is tried token by
token far past the window, while positions are lowered to stay below the length that the model was trained to, and for a
prompt longer than the window, several tokens at a time.

- **layers**: what mixes tokens in them, as the type's configuration calls it. *Full* attention keeps sinks and a
  window, and so does *sliding* attention where all layers slide. Beside full attention, *sliding* and *chunked*
  attention and recurrent states (*linear*, *conv*) are left as they are; *hybrid* is attention with a state in one
  layer. *Indexed* attention chooses its tokens by an index, among those that are kept; it is not compiled.
  *Position-free* attention rotates no keys. *Unused* are layers for images, which got none. *Ordered* attention
  knows the order of tokens by the columns of the cache (ALiBi: BLOOM, MPT, and Falcon where `alibi` is set). It costs a
  copy of the window at each step, several tokens that evict go in one by one, and nothing is compiled. It is compared
  with a plain cache out of which the oldest token behind the sinks is cut at each step.
- **rotation**: how the keys were found to rotate with their position: which cached tensor does, whether its pairs are
  neighbours (*interleaved*) or the two halves, and how many dimensions of each (tiny) head rotate.

| model type | layers | rotation |
| --- | --- | --- |
{streaming_rows}
## Published models

What published models switch on and the types by default do not, at their ratios and as small, tried in the same way.
Settings are in `tools/published.py`.

| type | what published models have | |
| --- | --- | --- |
{published_rows}
## These are refused

| why | model types |
| :---: | --- |
{refused_rows}
{legend}{unbuilt_rows}
{of_images}"""

IMAGES_TEXT = """\
## Models of images and text

Of the {total} model types that transformers {version} knows as models of images and text, **{streams} stream text, and
{exact} of these images too**; {refused} are refused{not_built}.

Text is tried as above. Images are tried in a conversation of two turns: one is among the sinks of a prompt that is
longer than the window and goes in by three tokens at a time, and another comes in the second turn. All logits are those
of one forward pass over all ids and images, in which copies of the sinks are appended at moved positions. A letter says
why images do not stream.

| model type | layers | images |
| --- | --- | :---: |
{streaming_rows}
{legend_of_images}
Not even text streams with these:

| why | model types |
| :---: | --- |
{refused_rows}
{legend}{unbuilt_rows}"""

NOT_BUILT_TEXT = """
These could not be built:

{rows}"""

# Why types are refused, in few words: by what their refusal's message has in it.
REASONS = {
    "not by a rotation": "Its keys change with their position, but not by a rotation, as where a vector is learned for "
    "each position. They can't be moved as tokens are evicted.",
    "takes no `position_ids`": "Its forward takes no `position_ids`, or makes nothing of them, and what it caches of a "
    "token tells the token's place (most encoder-decoders). A stream must change these places to keep them bounded. Or "
    "it puts learned tokens before what it is given (cpmant).",
    "no layer": "No layer rotates its keys, and it does not go by the columns of its cache either: it has none, or has "
    "layers beside it that slide or keep a state.",
    "of each other changes": "What its tokens see of each other changes when all move by the same distance.",
    "more than keys and values": "Its layers cache more than keys, values and an index that chooses tokens: positions, "
    "or compressed tokens.",
    "layers in loops": "It runs layers in loops, adds some to its cache for these, or reads keys out of it by itself.",
    "attends to all tokens": "None of its layers attends to all tokens, so it takes constant memory without a sink "
    "cache.",
    "a cache": "transformers gives it a cache of its own, or none.",
    "encoder-decoder": "It is an encoder-decoder, and only a decoder can be streamed.",
    "pixel_values": "It makes nothing of text alone: it demands an image.",
    "down to its decoder": "It hands more down to its decoder than is known what belongs to which token. Images are "
    "served in a prompt that goes in at once.",
    "but not those that come next": "Tokens of an image see those of later images too.",
    "do not move by one rotation": "The two dimensions of a pair in its keys turn with different axes of an image's "
    "positions, so no rotation moves them.",
    "keeps keys without positions": "Its index goes by the columns of the cache.",
    "that generates, got": "It has no `generate` of transformers: it makes a block at once, or actions.",
    "tokens after it": "What it gives for a token depends on tokens after it.",
    "has no attribute 'image_outputs'": "Its forward asks for an output that it does not have, with any cache.",
    "shared_kv_states": "It drafts for another model, out of whose keys and values it reads. It has none of its own.",
    "than one table of embeddings": "Each of its tokens is several codes of a sound.",
}


def report(rows: list[Row]) -> str:
    """The text of COMPATIBILITY.md: the types that stream, then those that are refused, by why; and those of images."""
    published = [row for row in rows if row.model_type in PUBLISHED]
    of_images = [row for row in rows if row.of_images]
    rows = [row for row in rows if not (row.of_images or row.model_type in PUBLISHED)]
    return REPORT_TEXT.format(
        version=transformers.__version__,
        published_rows="".join(
            f"| {PUBLISHED[row.model_type][0]} | {row.model_type} | {row.verdict} |\n" for row in published
        ),
        of_images=_of_images(of_images),
        **_sections(rows),
    )


def _sections(rows: list[Row]) -> dict[str, Any]:
    """What the text has of types that were given text, by the names of its fields."""
    by_verdict = collections.defaultdict(list)
    for row in rows:
        by_verdict[row.verdict.split(":")[0]].append(row)
    not_built = by_verdict["not built"]
    refused, legend = _by_reason({row.model_type: row.verdict for row in by_verdict["refused"]})
    unbuilt = "".join(f"- {row.model_type}: {row.verdict.removeprefix('not built: ')}.\n" for row in not_built)
    return dict(
        total=len(rows),
        streams=len(by_verdict["streams"]),
        refused=len(by_verdict["refused"]),
        not_built=f"; {len(not_built)} could not be built" if not_built else "",
        streaming_rows="".join(
            f"| {row.model_type} | {row.layers} | {row.rotation} |\n" for row in by_verdict["streams"]
        ),
        refused_rows="".join(f"| {letter} | {', '.join(types)} |\n" for letter, types in refused.items()),
        legend="".join(f"- **{letter}**: {reason}\n" for letter, reason in legend.items()),
        unbuilt_rows=NOT_BUILT_TEXT.format(rows=unbuilt) if unbuilt else "",
    )


def _of_images(rows: list[Row]) -> str:
    """The part about types of images and text."""
    sections = _sections(rows)
    streaming = [row for row in rows if row.verdict == "streams"]
    exact = sum(row.images == "streams" for row in streaming)
    others, legend = _by_reason({row.model_type: row.images for row in streaming if row.images != "streams"})
    letters = {model_type: letter.lower() for letter, types in others.items() for model_type in types}
    sections["streaming_rows"] = "".join(
        f"| {row.model_type} | {row.layers} | {letters.get(row.model_type, 'stream')} |\n" for row in streaming
    )
    sections["legend_of_images"] = "".join(f"- **{letter.lower()}**: {reason}\n" for letter, reason in legend.items())
    return IMAGES_TEXT.format(version=transformers.__version__, exact=exact, **sections)


def _by_reason(verdicts: dict[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """By a letter, the types that share a reason; and the reasons."""
    found: dict[str, list[str]] = {reason: [] for reason in REASONS.values()}
    for model_type, verdict in verdicts.items():
        message = verdict.partition(": ")[2]
        reason = next(
            (reason for words, reason in REASONS.items() if words in message), f"{message.removesuffix('.')}."
        )
        found.setdefault(reason, []).append(model_type)
    lettered = list(zip(string.ascii_uppercase, filter(found.get, found)))
    return {letter: found[reason] for letter, reason in lettered}, dict(lettered)


def no_longer(rows: list[Row], old: str) -> list[str]:
    """What streams text, or images, by the text `old` of COMPATIBILITY.md, and is refused it or not built now.

    A type that transformers has no more is none of these.
    """
    of_text, of_images = old.split("## Models of images and text")
    table = of_text.partition("## Published models")[0]
    streamed = [(name, False, False) for name in re.findall(r"^\| ([\w.-]+) \| ", table, flags=re.MULTILINE)]
    found = re.findall(r"^\| ([\w.-]+) \| .* \| (\w+) \|$", of_images, flags=re.MULTILINE)
    streamed += [(name, True, images == "stream") for name, images in found]
    now = {(row.model_type, row.of_images): row for row in rows}
    known = [(now[name, of_images], images) for name, of_images, images in streamed if (name, of_images) in now]
    return [
        row.model_type
        for row, images in known
        if not row.wrong and (row.verdict != "streams" or (images and row.images != "streams"))
    ]


def quiet() -> None:
    """Make a worker silent, leave the other core to the other one, and what was imported out of the collector."""
    gc.freeze()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="a model type to try (default: all, written down)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless COMPATIBILITY.md is current")
    parser.add_argument(
        "--ahead", action="store_true", help="write nothing; show what would change, and fail for what streamed alone"
    )
    arguments = parser.parse_args()
    tasks = [(name, False) for name in [*sorted(MODEL_TYPES), *PUBLISHED]]
    tasks += [(name, True) for name in sorted(WITH_IMAGES)]
    if arguments.types:
        if unknown := set(arguments.types) - {name for name, _ in tasks}:
            parser.error(f"transformers {transformers.__version__} has no such models: {', '.join(unknown)}")
        tasks = [task for task in tasks if task[0] in arguments.types]

    rows = []
    with multiprocessing.get_context("spawn").Pool(2, quiet) as pool:
        for row in pool.imap(attempt, tasks):
            rows.append(row)
            found = (row.model_type, row.verdict, row.layers, row.rotation, row.images and f"images: {row.images}")
            print("  ".join(filter(None, found)), flush=True)
    wrong = [row.model_type for row in rows if row.wrong]
    text, old = report(rows), REPORT.read_text() if REPORT.exists() else ""
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), "COMPATIBILITY.md", "now", lineterm="")
    changes = "\n".join(lines)
    if arguments.ahead:
        print(changes)
        wrong += no_longer(rows, old)
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")
    if arguments.check and changes:
        sys.exit(changes)
    if not (arguments.types or arguments.check or arguments.ahead):
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
