"""What the tests share: small random models, prompts, the release at hand."""

import base64
import contextlib
import io
import os
import random
import socket
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DeepseekV3Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
)

from custom_generate.generate import generate
from tests.support import ROOT

RELEASE = Version(transformers.__version__)
with_the_old_class = pytest.mark.skipif(
    RELEASE >= Version("4.53"), reason="transformers.SinkCache was removed in 4.53; `make test` also runs 4.52.4"
)


def at_the_ends(*case):
    """A case of a parametrised test for the oldest and the newest release alone: between them it is like others."""
    return pytest.param(*case, marks=pytest.mark.ends_only)


def on_the_newest(*case):
    """A case for the newest release alone: of arithmetic that no release has a part in."""
    return pytest.param(*case, marks=pytest.mark.newest_only)


SMALL = dict(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
)
CONFIGS = {
    "llama": lambda **settings: LlamaConfig(**{**SMALL, **settings}),
    "qwen3": lambda **settings: Qwen3Config(**{**SMALL, "head_dim": 16, **settings}),
    "mistral": lambda **settings: MistralConfig(**{**SMALL, "sliding_window": None, **settings}),
    "deepseek_v3": lambda **settings: DeepseekV3Config(**{**SMALL, **LATENT, **settings}),
}


def small_model(config="llama", attn_implementation: str = "sdpa", **settings) -> PreTrainedModel:
    """A random float32 model whose attention is sharp, so that a key turned wrongly can't hide among the others."""
    config = CONFIGS[config](**settings) if isinstance(config, str) else config
    with seeded():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    return sharpened(model)


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, with queries and keys made larger."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")):
            parameter.data *= 8
        elif name.endswith(("q_norm.weight", "k_norm.weight")):  # these undo the scale of the projections
            parameter.data *= 1.5
    return model


def stream(model: PreTrainedModel, input_ids: torch.Tensor, max_new_tokens: int = 40, seed: int = 0, **kwargs):
    """What `generate` samples, so that it never settles into a loop, past a window of 16 with 4 sinks."""
    settings = dict(min_new_tokens=max_new_tokens, do_sample=True, return_dict_in_generate=True, output_logits=True)
    with seeded(seed):
        return generate(model, 16, 4, input_ids=input_ids, max_new_tokens=max_new_tokens, **settings, **kwargs)


def answer(model: PreTrainedModel, cache, input_ids: torch.Tensor, max_new_tokens: int = 20, seed: int = 0, **kwargs):
    """One turn in `cache`, of that window; prompts go in token by token, so that the oracle's window is exact."""
    return stream(model, input_ids, max_new_tokens, seed, past_key_values=cache, prefill_chunk_size=1, **kwargs)


def changing(module: torch.nn.Module, change) -> None:
    """Have `module` give `change(what it gave)`: as part of the model, where a hook would be its user's."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))


def remembering(rotary: torch.nn.Module) -> None:
    """Have the rotary embeddings of a model keep the `latest` positions that they were given."""
    forward = rotary.forward

    def remember(*args, **kwargs):
        rotary.latest = kwargs.get("position_ids", args[-1])
        return forward(*args, **kwargs)

    rotary.forward = remember


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, with a chat template."""
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    template = (
        "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )


def small_model_of_images() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random LLaVA, whose images are four tokens each, and its processor. Its tokenizer is the one above."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava import LlavaProcessor

    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    content = (
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4}),
        tokenizer,
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template.replace("{{ message.content }}", content),
    )
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=4, patch_size=2, projection_dim=32, **sizes),
        text_config=LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )
    with seeded():
        return sharpened(AutoModelForImageTextToText.from_config(config).eval()), processor


def png(seed: int) -> bytes:
    """A file with a random image of four by four pixels."""
    from PIL import Image

    file, pixels = io.BytesIO(), random.Random(seed).randbytes(4 * 4 * 3)
    Image.frombytes("RGB", (4, 4), pixels).save(file, "png")
    return file.getvalue()


def image_url(seed: int) -> str:
    """The same as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"


def loadable(folder: Path) -> str:
    """`folder` for `custom_generate=`: 4.52 copies its file only if there is a place for it (transformers #38916)."""
    if RELEASE < Version("4.53"):
        place = Path(os.environ["HF_HOME"]) / "modules/transformers_modules" / folder.name / "custom_generate"
        place.mkdir(parents=True, exist_ok=True)
    return str(folder)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def seeded(seed: int = 0):
    """Seed torch for the block, and put its random state back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random tokens of the small models, int64 `[rows, length]`."""
    return torch.randint(2, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor], padding: int = 0) -> dict[str, torch.Tensor]:
    """Prompts, each `[1, length]`, as one batch: `input_ids` and `attention_mask`."""
    longest = max(ids.shape[1] for ids in prompts)
    input_ids = torch.full((len(prompts), longest), padding)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - ids.shape[1] :] = ids
        attention_mask[row, longest - ids.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
