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
    return rope | settings


def scaled_by_position(length: int) -> dict[str, Any]:
    """YaRN as of Ministral 3. The oracle, which is trained to any length, scales no queries."""
    scaled = dict(mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)
    return dict(YARN, factor=16.0, llama_4_scaling_beta=0.1 if length < 100 else 0.0, **scaled)


def phi3(length: int, pairs: int, **settings) -> dict[str, Any]:
    """The settings of a Phi-3 with such factors, and the sizes that go with them."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    rope = long_rope(length, pairs, **settings)
    return dict(rope_parameters=rope, original_max_position_embeddings=length, **sizes)


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
    "Mistral Nemo: a head size that does not divide": ("mistral", dict(head_dim=24, sliding_window=None)),
    "Ministral 3: YaRN, and queries scaled by their position": (
        "ministral3",
        lambda length: dict(rope_parameters=scaled_by_position(length)),
    ),
    "Qwen3 0.6B: heads wider than the model": ("qwen3", dict(head_dim=32)),
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
    "Phi-3 mini 128k: longrope": ("phi3", lambda length: phi3(length, 8)),
    "Phi-4 mini: longrope on three quarters": (
        "phi3",
        lambda length: phi3(length, 6, partial_rotary_factor=0.75),
    ),
    "Phi-3 mini 4k: all layers slide": ("phi3", dict(sliding_window=20)),
    "Phi-3.5 MoE: longrope": (
        "phimoe",
        lambda length: dict(rope_parameters=long_rope(length, 8, short_mscale=1.2, long_mscale=1.3)),
    ),
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
    "Cohere R+: normed queries and keys": ("cohere", dict(use_qk_norm=True)),
    "Granite 3: multipliers": (
        "granite",
        dict(embedding_multiplier=12.0, attention_multiplier=0.0625, residual_multiplier=0.22, logits_scaling=8.0),
    ),
    "Granite 4 dense: rotation": (
        "granitemoehybrid",
        dict(position_embedding_type="rope", num_hidden_layers=4, layer_types=[FULL] * 4, num_local_experts=0),
    ),
    "Falcon-H1: multipliers": (
        "falcon_h1",
        dict(key_multiplier=0.5, attention_out_multiplier=0.9, ssm_multipliers=[0.35, 0.25, 0.17, 0.5, 0.35]),
    ),
    "Hunyuan: dynamic scaling by alpha": (
        "hunyuan_v1_dense",
        dict(rope_parameters=dict(rope_type="dynamic", factor=1.0, alpha=1000.0, **THETA)),
    ),
    "OLMo: values clipped": ("olmo", dict(clip_qkv=0.5)),
    "StarCoder2: all layers slide": ("starcoder2", dict(sliding_window=20)),
    "Doge: more tokens than the window has are chosen among": ("doge", dict(keep_window_size=16)),
    "Doge: fewer tokens are": ("doge", dict(keep_window_size=8)),
    "Doge MoE: experts that are chosen across tokens": ("doge", dict(is_moe=True)),
    "EmbeddingGemma: bidirectional": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "Zamba 2: memory rotated": ("zamba2", dict(use_mem_rope=True, use_shared_attention_adapter=True)),
    "Yi, Nous: dynamic NTK scaling": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, **THETA))),
    "Ministral 8B: three layers of four slide": (
        "ministral",
        dict(num_hidden_layers=4, layer_types=[FULL, SLIDING, SLIDING, SLIDING]),
    ),
    "Llama 4 Scout: a temperature in layers without positions, Llama 3 factors": (
        "llama4_text",
        lambda length: dict(
            num_hidden_layers=4,
            floor_scale=length,
            attn_scale=0.5,
            rope_parameters=dict(LLAMA3, factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0)
            | dict(original_max_position_embeddings=16, rope_theta=500_000.0),
        ),
    ),
    "Llama 4 Maverick: experts in every other layer, not normed": (
        "llama4_text",
        dict(interleave_moe_layer_step=2, use_qk_norm=False),
    ),
    "Qwen2: slides from a layer on": (
        "qwen2",
        dict(num_hidden_layers=4, use_sliding_window=True, max_window_layers=3),
    ),
    "Qwen3: slides from a layer on": (
        "qwen3",
        dict(num_hidden_layers=4, use_sliding_window=True, max_window_layers=3),
    ),
    "Qwen2.5: YaRN": ("qwen2", dict(rope_parameters=YARN)),
    "Qwen3: YaRN": ("qwen3", dict(rope_parameters=YARN)),
    "Qwen3 MoE: dense layers between": ("qwen3_moe", dict(mlp_only_layers=[1], norm_topk_prob=True)),
    "Phi-2: two fifths rotate, normed": (
        "phi",
        dict(hidden_size=80, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.4, **THETA))
        | dict(qk_layernorm=True),
    ),
    "Falcon 40B: another decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "Falcon RW: ALiBi": ("falcon", dict(multi_query=False, alibi=True)),
    "RedPajama INCITE: all dimensions rotate, not parallel": (
        "gpt_neox",
        dict(
            rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0, **THETA),
            use_parallel_residual=False,
        ),
    ),
    "StableLM 2 12B: normed, parallel": ("stablelm", dict(qk_layernorm=True, use_parallel_residual=True)),
    "GLM 4.5: normed": ("glm4_moe", dict(use_qk_norm=True)),
    "OLMo 3: YaRN where it is full": (
        "olmo3",
        dict(
            num_hidden_layers=4,
            rope_parameters={FULL: dict(YARN, factor=8.0), SLIDING: dict(rope_type="default", **THETA)},
        ),
    ),
    "Gemma 3n: layers that share others' keys": (
        "gemma3n_text",
        dict(
            num_hidden_layers=10,
            num_kv_shared_layers=4,
            activation_sparsity_pattern=[0.95] * 3 + [0.0] * 7,
        ),
    ),
    "Gemma 4: layers that share others' keys": (
        "gemma4_text",
        dict(
            num_hidden_layers=10,
            layer_types=[SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
            num_kv_shared_layers=5,
        ),
    ),
    "InternLM 3: dynamic NTK scaling": (
        "internlm3",
        dict(rope_parameters=dict(rope_type="dynamic", factor=6.0, **THETA)),
    ),
    "AFM 4.5B: YaRN": ("arcee", dict(rope_parameters=dict(YARN, factor=20.0, mscale=1.0))),
    "EXAONE 4 32B: Llama 3 factors": (
        "exaone4",
        dict(
            num_hidden_layers=4,
            rope_parameters=dict(LLAMA3, factor=16.0, original_max_position_embeddings=16),
        ),
    ),
    "DeepSeek V2 Lite: queries not compressed": ("deepseek_v2", dict(q_lora_rank=None)),
    "MiniCPM 3: longrope": (
        "minicpm3",
        lambda length: dict(rope_parameters=long_rope(length, 4)),
    ),
    "Mistral Small 4: YaRN on latent keys, and queries scaled by their position": (
        "mistral4",
        lambda length: dict(rope_parameters=scaled_by_position(length)),
    ),
    "Llama 3.2 Vision: Llama 3 factors, given text": (
        "mllama",
        dict(text_config=dict(rope_parameters=dict(LLAMA3, original_max_position_embeddings=16))),
    ),
}
