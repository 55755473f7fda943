"""The sizes of real models, for random ones: what the benchmarks measure doesn't depend on their weights."""


def _sizes(*sizes: int, tied: bool = True) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "vocab_size", "rope_theta")
    return dict(zip(names, sizes), tie_word_embeddings=tied)


SHAPES = {
    "tiny": _sizes(64, 96, 2, 4, 2, 16, 256, 10_000),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, 64, 49152, 100_000),
    "qwen3-0.6b": _sizes(1024, 3072, 28, 16, 8, 128, 151936, 1_000_000),
    "llama-3.2-1b": _sizes(2048, 8192, 16, 32, 8, 64, 128256, 500_000),
    "llama-8b": _sizes(4096, 14336, 32, 32, 8, 128, 128256, 500_000, tied=False),
}
