"""What published checkpoints switch on, and tiny models by default do not: rows of the second table of the sweep.

Each has the settings of such checkpoints at their ratios, shrunk to the sizes of the sweep. A setting may depend on the
length that a model is trained to, since a stream and the oracle's single pass are held to the same frequencies.
"""

from collections.abc import Callable
from typing import Any, Union

Settings = Union[dict[str, Any], Callable[[int], dict[str, Any]]]

THETA = dict(rope_theta=10_000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, **THETA)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **THETA)
FULL, SLIDING = "full_attention", "sliding_attention"


def long_rope(length: int, pairs: int, **settings) -> dict[str, Any]:
    """Factors as of Phi-3, for so many pairs of dimensions: near 1 up to `length`, and larger beyond."""
    factors = dict(short_factor=[1.0 + 0.05 * pair for pair in range(pairs)])
    factors |= dict(long_factor=[1.0 + 3.0 * pair for pair in range(pairs)])
    rope = dict(rope_type="longrope", original_max_position_embeddings=length, factor=32.0, **factors, **THETA)
    rope |= dict(attention_factor=1.19)  # which by default follows from the length
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    return dict(rope_parameters=rope | settings, original_max_position_embeddings=length, **sizes)


# By what it is: the model type, and the settings.
PUBLISHED: dict[str, tuple[str, Settings]] = {
    "Llama 3.1: Llama 3 factors": (
        "llama",
        dict(rope_parameters=dict(LLAMA3, original_max_position_embeddings=16), num_key_value_heads=1),
    ),
    "Llama 3.2 1B: tied embeddings, a factor of 32": (
        "llama",
        dict(rope_parameters=dict(LLAMA3, factor=32.0, original_max_position_embeddings=16), tie_word_embeddings=True),
    ),
    "Vicuna 16k, DeepSeek Coder: linear scaling": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, **THETA)),
    ),
    "Yi, Nous: dynamic NTK scaling": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, **THETA))),
    "Mistral Nemo: a head size that does not divide": ("mistral", dict(head_dim=24, sliding_window=None)),
    "Mistral 7B v0.1: all layers slide": ("mistral", dict(sliding_window=20)),
    "Mixtral: experts, no sliding": ("mixtral", dict(sliding_window=None, num_experts_per_tok=2)),
    "Ministral 8B: layers that slide between full ones": (
        "ministral",
        dict(num_hidden_layers=4, sliding_window=12, layer_types=[FULL, SLIDING, SLIDING, SLIDING]),
    ),
    "Ministral 3: YaRN, and queries scaled by their position": (
        "ministral3",
        lambda length: dict(
            rope_parameters=dict(YARN, factor=16.0, llama_4_scaling_beta=0.1 if length < 100 else 0.0, mscale=1.0)
            | dict(mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)
        ),
    ),
    "Llama 4: a temperature in layers without positions": (
        "llama4_text",
        lambda length: dict(attn_temperature_tuning=True, floor_scale=length, attn_scale=0.5, use_qk_norm=True),
    ),
    "Qwen2: sliding from a layer on": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=12, max_window_layers=2, layer_types=None),
    ),
    "Qwen2.5 1M, Qwen3: YaRN": ("qwen3", dict(rope_parameters=YARN)),
    "Qwen3 0.6B: heads wider than the model": ("qwen3", dict(head_dim=32)),
    "Qwen3 MoE: dense layers between": (
        "qwen3_moe",
        dict(mlp_only_layers=[1], decoder_sparse_step=1, norm_topk_prob=True),
    ),
    "gpt-oss: YaRN not truncated, sinks of its own": (
        "gpt_oss",
        dict(
            rope_parameters=dict(YARN, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False),
            num_key_value_heads=1,
        ),
    ),
    "DeepSeek V3: YaRN with its scale": (
        "deepseek_v3",
        dict(rope_parameters=dict(YARN, factor=40.0, mscale=1.0, mscale_all_dim=1.0, rope_interleave=True)),
    ),
    "DeepSeek V2: YaRN with another scale": (
        "deepseek_v2",
        dict(rope_parameters=dict(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.707)),
    ),
    "Phi-3 mini 128k: longrope": ("phi3", lambda length: long_rope(length, 8)),
    "Phi-4 mini: longrope on three quarters": (
        "phi3",
        lambda length: long_rope(length, 6, partial_rotary_factor=0.75) | dict(partial_rotary_factor=0.75),
    ),
    "Phi-3 mini 4k: all layers slide": ("phi3", dict(sliding_window=20)),
    "Phi-2: two fifths rotate, normed": (
        "phi",
        dict(
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, **THETA),
            partial_rotary_factor=0.5,
            qk_layernorm=True,
        ),
    ),
    "Phi-3.5 MoE: longrope": ("phimoe", lambda length: long_rope(length, 8, short_mscale=1.2, long_mscale=1.3)),
    "Gemma 2: soft caps": ("gemma2", dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "Gemma 2B: one key head": ("gemma", dict(num_key_value_heads=1, head_dim=24)),
    "Gemma 3 4B: linear scaling in full layers": (
        "gemma3_text",
        dict(
            rope_parameters={
                FULL: dict(rope_type="linear", factor=8.0, rope_theta=1_000_000.0),
                SLIDING: dict(rope_type="default", **THETA),
            },
            query_pre_attn_scalar=16,
        ),
    ),
    "Gemma 3n: layers that share others' keys": ("gemma3n_text", dict(num_kv_shared_layers=4)),
    "Gemma 4: layers that share others' keys": (
        "gemma4_text",
        dict(num_hidden_layers=6, num_kv_shared_layers=2, layer_types=[SLIDING, SLIDING, FULL] * 2),
    ),
    "Cohere R+: normed queries and keys": ("cohere", dict(use_qk_norm=True)),
    "Falcon 7B: one key head": ("falcon", dict(multi_query=True, new_decoder_architecture=False, alibi=False)),
    "Falcon 40B: another decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False)),
    "Falcon RW: ALiBi": ("falcon", dict(multi_query=False, new_decoder_architecture=False, alibi=True)),
    "GPT-NeoX: a quarter rotates, not parallel": (
        "gpt_neox",
        dict(
            rotary_pct=0.25,
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25, **THETA),
            use_parallel_residual=False,
            head_dim=None,
        ),
    ),
    "StableLM 2 12B: a quarter rotates, normed, parallel": (
        "stablelm",
        dict(
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25, **THETA),
            partial_rotary_factor=0.25,
            qk_layernorm=True,
            use_parallel_residual=True,
        ),
    ),
    "GLM 4: half rotates, two key heads": (
        "glm4",
        dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, **THETA), partial_rotary_factor=0.5),
    ),
    "GLM 4.5: normed, with experts": (
        "glm4_moe",
        dict(
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, **THETA),
            partial_rotary_factor=0.5,
            use_qk_norm=True,
        ),
    ),
    "Granite 3: multipliers": (
        "granite",
        dict(embedding_multiplier=12.0, attention_multiplier=0.0625, residual_multiplier=0.22, logits_scaling=8.0),
    ),
    "Granite 4: no positions beside states": ("granitemoehybrid", dict(position_embedding_type="nope")),
    "Granite 4 dense: rotation": (
        "granitemoehybrid",
        dict(position_embedding_type="rope", layer_types=[FULL] * 4, num_local_experts=0),
    ),
    "Falcon-H1: multipliers": (
        "falcon_h1",
        dict(key_multiplier=0.5, attention_out_multiplier=0.9, ssm_multipliers=[0.35, 0.25, 0.17, 0.5, 0.35]),
    ),
    "Hunyuan: dynamic scaling by alpha": (
        "hunyuan_v1_dense",
        dict(rope_parameters=dict(rope_type="dynamic", factor=1.0, alpha=1000.0, **THETA)),
    ),
    "OLMo 3: YaRN where it is full": (
        "olmo3",
        dict(
            num_hidden_layers=4,
            sliding_window=12,
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_parameters=YARN,
        ),
    ),
    "OLMo: values clipped": ("olmo", dict(clip_qkv=0.5)),
    "StarCoder2: all layers slide": ("starcoder2", dict(sliding_window=20)),
    "Persimmon: half rotates, normed": (
        "persimmon",
        dict(
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, **THETA),
            partial_rotary_factor=0.5,
            qk_layernorm=True,
        ),
    ),
    "Doge: more tokens than the window has are chosen among": ("doge", dict(keep_window_size=16)),
    "Doge: fewer tokens are": ("doge", dict(keep_window_size=8)),
    "Zamba 2: memory rotated": ("zamba2", dict(use_mem_rope=True, use_shared_attention_adapter=True)),
    "SmolLM 3: one layer in four without positions": (
        "smollm3",
        dict(num_hidden_layers=4, use_sliding_window=False, no_rope_layers=[1, 1, 1, 0]),
    ),
}
