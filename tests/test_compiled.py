"""Compiled decoding, by transformers' own way: one graph, whatever happens to the window, and the tokens of eager."""

import runpy

import pytest
import torch
import transformers
from packaging.version import Version
from torch._inductor import compile_fx
from transformers import CompileConfig

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import RELEASE, at_the_ends, left_padded, prompt, seeded, small_model
from tests.support.oracle import difference
from tests.test_towers import images_of, model_with_a_tower, typed

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7") and RELEASE >= Version("5.2"),
    reason="from 5.2 transformers needs torch 2.7 to be compiled",
)
NEW_TOKENS = 28
# Models of 4.52 ask how many tokens were seen: for the second one, their code is compiled again, for any number.
GRAPHS = 2 if RELEASE < Version("4.53") else 1


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def tracing(graphs: list) -> CompileConfig:
    """Compile on the CPU too, all of it as one graph or not at all, keep each graph, and run it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def stream(model, ids, cache=None, max_new_tokens=NEW_TOKENS, **kwargs):
    cache = SinkCache(16, 4) if cache is None else cache
    with seeded():
        return generate(
            model, input_ids=ids, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=True, **kwargs
        )


def model_that_shifts_back():
    """The window of 16 fills and, at position 24, is shifted back: twice while 28 tokens come."""
    return small_model(num_hidden_layers=2, max_position_embeddings=24)


@pytest.mark.parametrize("rows", [at_the_ends(1), 2])
def test_one_graph_for_all_streams(rows):
    model, graphs = model_that_shifts_back(), []
    config = tracing(graphs)
    for length in (5, 7, 40):  # the window fills while decoding, or in the prompt
        ids = prompt(length).expand(rows, -1)
        cache = SinkCache(16, 4)
        sequences = stream(model, ids, cache, compile_config=config)
        assert torch.equal(sequences, stream(model, ids))
        assert cache.get_seq_length() == length + NEW_TOKENS - 1  # whose positions were shifted back
    assert len(graphs) == GRAPHS
    assert not torch._dynamo.utils.counters["graph_break"]


def test_one_graph_for_rows_of_their_own():
    model, graphs = model_that_shifts_back(), []
    inputs = left_padded([prompt(9), prompt(3), prompt(14)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sequences = stream(model, ids, attention_mask=mask, compile_config=tracing(graphs))
    assert torch.equal(sequences, stream(model, ids, attention_mask=mask))
    assert len(graphs) == GRAPHS


@pytest.mark.newest_only
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])  # the latter with positions of several axes
def test_one_graph_for_streams_with_images(name):
    model, graphs = model_with_a_tower(name), []
    ids, image, other = images_of(model, name)
    config, compiled, eager = tracing(graphs), SinkCache(16, 4), SinkCache(16, 4)
    said = torch.empty(1, 0, dtype=torch.long)
    for new, images in ((ids, image), (prompt(3).clamp(2, 200), {}), (ids, other)):  # the window fills while decoding
        said = torch.cat([said, new], dim=1)
        inputs = images | typed(said, name) | dict(suppress_tokens=[0, 208, 209, 210])
        inputs |= dict(attention_mask=torch.ones_like(said), return_dict_in_generate=True, output_logits=True)
        output = stream(model, said, compiled, 20, **inputs, compile_config=config)
        expected = stream(model, said, eager, 20, **inputs)
        assert torch.equal(output.sequences, expected.sequences)
        assert difference(torch.cat(output.logits), torch.cat(expected.logits)) < 1e-5
        said = output.sequences
    assert len(graphs) == GRAPHS
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.ends_only
def test_turns_compiled_and_not_in_one_conversation(tmp_path):
    model, graphs = model_that_shifts_back(), []
    both, eager, config = SinkCache(16, 4), SinkCache(16, 4), tracing(graphs)
    sequences = prompt(5)
    for turn, compiled in enumerate((True, False, True, True)):
        ids = torch.cat([sequences, prompt(1 + turn)], dim=1)
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=11)
        sequences = stream(model, ids, both, **settings, **({"compile_config": config} if compiled else {}))
        assert torch.equal(sequences, stream(model, ids, eager, **settings))
        both.save(tmp_path / "conversation")
        both = SinkCache.load(tmp_path / "conversation", model)
    assert len(graphs) == GRAPHS


def test_no_compilation_where_it_is_disabled():
    model, graphs = small_model(num_hidden_layers=1), []
    sequences = stream(model, prompt(5), compile_config=tracing(graphs), disable_compile=True)
    assert torch.equal(sequences, stream(model, prompt(5))) and graphs == []


def test_no_compilation_where_the_past_is_recorded():
    model, graphs = small_model(num_hidden_layers=1), []
    cache = SinkCache(16, 4).bind(model)
    cache.activate_past_recording()
    sequences = stream(model, prompt(5), cache, compile_config=tracing(graphs))
    assert torch.equal(sequences, stream(model, prompt(5))) and graphs == []
    cache.crop(max_length=cache.get_seq_length() - 8)  # of which a compiled step would keep one


@pytest.mark.skipif(RELEASE < Version("4.56"), reason="until 4.55 no layers of several kinds are served")
def test_no_compilation_with_layers_that_slide():
    kinds = ["full_attention", "sliding_attention"]
    model, graphs = small_model("qwen3", layer_types=kinds, sliding_window=10, use_sliding_window=True), []
    sequences = stream(model, prompt(5), compile_config=tracing(graphs))
    assert torch.equal(sequences, stream(model, prompt(5))) and graphs == []


@pytest.mark.skipif(RELEASE < Version("5.2"), reason="until 5.1 torch 2.6 can compile it")
def test_no_compilation_by_a_torch_that_fails_at_it(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    with_old_torch = runpy.run_path(str(ROOT / "custom_generate/generate.py"))["generate"]
    model, graphs = small_model(num_hidden_layers=1), []
    settings = dict(input_ids=prompt(5), max_new_tokens=NEW_TOKENS, do_sample=False)
    sequences = with_old_torch(model, 16, 4, compile_config=tracing(graphs), **settings)
    assert torch.equal(sequences, generate(model, 16, 4, **settings)) and graphs == []


def test_no_compilation_without_this_generate():
    """transformers' own loop prepares no steps for compiled code, so it is not offered this cache for that."""
    model, graphs = small_model(num_hidden_layers=1), []
    cache = SinkCache(16, 4).bind(model)
    with seeded():
        sequences = model.generate(
            input_ids=prompt(5),
            **{CACHE: cache},
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            compile_config=tracing(graphs),
        )
    assert torch.equal(sequences, stream(model, prompt(5))) and graphs == []


def test_an_error_between_compiled_steps_loses_nothing():
    model, graphs, seen = small_model(num_hidden_layers=2), [], []

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids)
        if input_ids.shape[1] == 25:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    cache, before = SinkCache(16, 4), set(vars(model))
    config = tracing(graphs)
    with pytest.raises(KeyboardInterrupt):
        generate(
            model,
            input_ids=prompt(5),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            compile_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([stop]),
        )
    assert set(vars(model)) == before and not cache.is_compileable
    assert cache.get_seq_length() == 24
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    sequences = generate(model, input_ids=seen[-1], past_key_values=cache, compile_config=config, **settings)
    assert torch.equal(sequences[:, : 5 + NEW_TOKENS], generate(model, 16, 4, input_ids=prompt(5), **settings))
    assert len(graphs) == GRAPHS


@pytest.mark.slow
@pytest.mark.newest_only
def test_code_for_this_processor_writes_only_where_cuda_graphs_may():
    """Such code is not recorded as a CUDA graph if it writes into inputs whose place in memory is not known to stay."""
    written, static = [], []

    def compile_graph(graph, inputs, static_input_idxs=(), **kwargs):
        code = compile_fx.compile_fx_inner(graph, inputs, static_input_idxs=static_input_idxs, **kwargs)
        written.append(set(code.mutated_input_idxs))
        static.append(set(static_input_idxs))
        return code

    def backend(graph, inputs):
        patches = {"force_disable_caches": True}  # what another run has compiled is not seen here
        return compile_fx.compile_fx(graph, inputs, inner_compile=compile_graph, config_patches=patches)

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    model = small_model(num_hidden_layers=1, max_position_embeddings=24)
    sequences = stream(model, prompt(5), compile_config=config)
    assert torch.equal(sequences, stream(model, prompt(5)))
    assert len(written) == GRAPHS
    assert all(len(each) == 2 for each in written)  # keys and values
    assert all(each <= known for each, known in zip(written, static))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("rows", [1, 2])
def test_cuda_graphs_by_default(rows):
    model = model_that_shifts_back().cuda()
    ids = prompt(5).expand(rows, -1).cuda()
    sequences = [stream(model, ids) for _ in range(3)]
    expected = stream(model, ids, disable_compile=True)
    assert all(torch.equal(each, expected) for each in sequences)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == GRAPHS and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
