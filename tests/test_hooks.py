"""Hooks on a model: its user's see the conversation alone, and those that it needs to work run in readings too."""

import copy
import functools
import gc
import weakref

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import changing, loadable, prompt, seeded, small_model, stream
from tests.support.oracle import difference, oracle


def seen_by(model, names=None) -> list[tuple]:
    """A list that grows by the name of each of these modules, '' for the model, and the shape of what it gave."""
    seen: list[tuple] = []
    for name, module in model.named_modules():
        if names is None or name in names:
            module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, shape_of(output))))
    return seen


def shape_of(output) -> list[int]:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return list(output.shape)


def say(model, **kwargs) -> torch.Tensor:
    return generate(model, 16, 4, input_ids=prompt(9), max_new_tokens=12, do_sample=False, **kwargs)


# --- those of users


def as_it_is(model):
    return model


def dispatched(model):
    """With the hooks of accelerate, which puts functions in the place of forwards."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


def wrapped(model):
    """With functions of the user in the place of forwards, of which one wraps another and is in its own closure."""
    for module in (model, model.model, model.model.layers[1]):
        changing(module, lambda output: output)

    def forward(*args, **kwargs):
        return own(*args, **kwargs) if forward else None

    own = model.forward
    model.forward = forward
    return model


class Controller:
    """An object in the place of a forward, that counts, as some tools have one. A copy of it counts by itself."""

    def __init__(self, module):
        self.module, self.count = weakref.ref(module), 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return type(self.module()).forward(self.module(), *args, **kwargs)

    def __deepcopy__(self, memo):
        return Controller(copy.deepcopy(self.module(), memo))


def controlled(model):
    model.forward = functools.update_wrapper(Controller(model), type(model).forward)
    return model


@pytest.mark.parametrize("build", [as_it_is, dispatched, wrapped, controlled])
def test_hooks_of_users_see_the_conversation_alone(build):
    model, everywhere = build(small_model()), []
    names = {name for name, _ in model.named_modules()} - {"model.rotary_emb"}
    seen = seen_by(model, names)
    of_all = torch.nn.modules.module.register_module_forward_pre_hook(lambda *args: everywhere.append(args))
    try:
        SinkCache(16, 4).bind(model)
        SinkCache(600, 4).bind(model)  # read as far as its window goes
        assert seen == [] and everywhere == []
    finally:
        of_all.remove()
    tokens = say(model)
    assert torch.equal(tokens, say(small_model()))
    assert [shape for name, shape in seen if name == "model.layers.0"] == [[1, 9, 64]] + 11 * [[1, 1, 64]]
    assert {name for name, _ in seen} == names - {"model.layers"}  # a list, which is never called
    if build is controlled:
        assert model.forward.count == 12


def test_what_hooks_of_users_change_is_not_read_but_served():
    model = small_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, keys: keys + keys.roll(1, -1))
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    output = stream(model, prompt(3))
    expected = oracle(model, output.sequences[0].tolist(), 16, 4)[2:-1]
    assert difference(torch.cat(output.logits), expected) < 1e-5
    plain = oracle(small_model(), output.sequences[0].tolist(), 16, 4)[2:-1]
    assert difference(plain, expected) > 0.1


def test_a_layer_that_the_user_compiled_is_not_compiled_to_be_read():
    torch.compiler.reset()
    model, graphs = small_model(num_hidden_layers=3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layers = model.model.layers
    layers[0] = torch.compile(layers[0], backend=backend)
    layers[1].compile(backend=backend)
    layers[2].forward = torch.compile(layers[2].forward, backend=backend)
    seen = seen_by(model, {"model.layers.0._orig_mod", "model.layers.1", "model.layers.2.mlp"})
    SinkCache(16, 4).bind(model)
    assert seen == [] and graphs == []


def test_a_reading_leaves_nothing_on_the_model_and_keeps_nothing_of_it():
    def held(model):
        own = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
        return own, [list(module._buffers.values()) + list(module._forward_hooks) for module in model.modules()]

    model = small_model()
    model.model.norm.register_forward_hook(lambda *args: None)
    model.lm_head.weight.data.zero_()  # so it is read by its hidden states, and 5.x has hooks for these
    before = held(model)
    gc.collect()
    gc.disable()
    try:
        SinkCache(16, 4).bind(model)
        assert held(model) == before
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


# --- those that a model needs


class Sharding:
    """The hooks of ZeRO-3 in DeepSpeed, as far as a reading can meet them.

    Weights are empty but while their module runs. What ran is recorded, and compared with what runs next time.
    """

    def __init__(self, model):
        self.recorded, self.step = [], 0
        for number, module in enumerate(model.modules()):
            module.number_of_shard = number
            self._shard(module)
        model.register_forward_pre_hook(of_deepspeed(self.begin))

    def _shard(self, module):
        weights = [weight for weight in module._parameters.values() if weight is not None]
        whole = [weight.data for weight in weights]

        def gather(module, args):
            expected = (self.recorded[self.step :] or [module])[0]
            assert expected.number_of_shard >= 0  # of whatever it recorded
            self.recorded[self.step :] = [module]
            self.step += 1
            for weight, data in zip(weights, whole):
                weight.data = data

        def release(*args):
            for weight in weights:
                weight.data = weight.data.new_empty(0)

        module.register_forward_pre_hook(of_deepspeed(gather))
        module.register_forward_hook(of_deepspeed(release))
        release()

    def begin(self, *args):
        self.step = 0


def of_deepspeed(function):
    def hook(*args):
        return function(*args)

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return hook


def test_a_model_whose_weights_are_there_only_while_it_runs():
    expected = say(small_model())
    model = small_model()
    Sharding(model)
    assert model.get_input_embeddings().weight.shape == (0,)
    for _ in range(2):  # the second meets what was recorded of the first
        assert torch.equal(say(model), expected)
    plain = model.generate(prompt(9), max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, expected[:, : plain.shape[1]])


class Halved(torch.nn.Embedding):
    """A table of half the size, which repeats what it gives by a hook on itself."""

    def repeat(self, module, args, output):
        return output.repeat(1, 1, 2)


def test_a_model_with_a_hook_of_its_own():
    model, whole = small_model(), small_model()
    half = model.get_input_embeddings().weight.data[:, :32]
    whole.get_input_embeddings().weight.data = half.repeat(1, 2)
    table = Halved(211, 32, _weight=half.clone())
    table.register_forward_hook(table.repeat)
    model.set_input_embeddings(table)
    assert torch.equal(say(model), say(whole))


# --- errors that tell nothing of the model


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
OF_THE_MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(NO_MEMORY),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"),
    torch.distributed.DistError("NCCL watchdog"),
    MemoryError(),
    TimeoutError("took too long"),
    OSError(5, "Input/output error"),
]


def failing(error, after: int = 0):
    """A small Llama that raises `error` once it has run so often."""
    model, runs = small_model(), []

    def forward(*args, **kwargs):
        runs.append(True)
        if len(runs) > after:
            raise error
        return own(*args, **kwargs)

    own = model.lm_head.forward
    model.lm_head.forward = forward
    return model


@pytest.mark.ends_only
@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=lambda error: type(error).__name__)
def test_errors_of_the_machine_pass_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised:
        SinkCache(16, 4).bind(failing(error))
    assert raised.value is error
    reads_further = failing(error, after=6)
    SinkCache(16, 4).bind(reads_further)
    with pytest.raises(type(error)) as raised:
        SinkCache(600, 4).bind(reads_further)
    assert raised.value is error
    cache = stream(small_model(), prompt(3), 5)[CACHE]
    cache.save(tmp_path / "conversation")
    with pytest.raises(type(error)) as raised:
        SinkCache.load(tmp_path / "conversation", failing(error))
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), NotImplementedError(), KeyError("x"), AssertionError()], ids=repr
)
def test_errors_of_the_model_are_told_of_it(error):
    with pytest.raises(ValueError, match="`model` .*can't be streamed: it failed on a few tokens") as raised:
        SinkCache(16, 4).bind(failing(error))
    assert raised.value.__cause__ is error


# --- an adapter for each row


@pytest.fixture
def adapted():
    """A small Llama with two LoRA adapters that change it a lot."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with seeded():
        model = peft.get_peft_model(small_model(), config, "one")
        model.add_adapter("other", config)
    return model.eval()


def hooks_of(model) -> list[int]:
    return [len(module._forward_pre_hooks) for module in model.modules()]


ROWS = ["one", "__base__", "other"]


def say_by_rows(model, **kwargs):
    settings = dict(window_length=16, num_sink_tokens=4, max_new_tokens=30, do_sample=False) | kwargs
    ids = prompt(9, rows=3)
    return model.generate(input_ids=ids, custom_generate=loadable(ROOT), trust_remote_code=True, **settings)


def test_an_adapter_for_each_row(adapted):
    before = hooks_of(adapted)
    tokens = say_by_rows(adapted, adapter_names=ROWS)
    assert hooks_of(adapted) == before
    for row, name in enumerate(ROWS):
        if name == "__base__":
            with adapted.disable_adapter():
                alone = say_by_rows(adapted)
        else:
            adapted.set_adapter(name)
            alone = say_by_rows(adapted)
        assert torch.equal(tokens[row], alone[row])
    assert not torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize(
    "wrong", [dict(window_length=-1), dict(num_sink_tokens=2.5), dict(prefill_chunk_size=0)], ids=repr
)
def test_a_refusal_takes_the_adapters_of_rows_off_again(wrong, adapted):
    before = hooks_of(adapted)
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}`"):
        say_by_rows(adapted, adapter_names=ROWS, **wrong)
    assert hooks_of(adapted) == before
    with torch.no_grad():
        adapted(prompt(3))
