"""Any sequence of operations leaves in the cache what a list of tokens says that it should."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from custom_generate.generate import SinkCache
from tests.support.helpers import small_model

pytestmark = pytest.mark.newest_only

HEAD_DIM = 16
MODELS = {length: small_model(num_hidden_layers=1, max_position_embeddings=length) for length in (8, 11, 512)}


def key(token: int, position: int, frequencies: torch.Tensor) -> torch.Tensor:
    """What a model makes of a token at a position, float64 `[HEAD_DIM]`."""
    raw = torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(token), dtype=torch.float64)
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
    first, second = raw.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


class Programs(RuleBasedStateMachine):
    """`rows` is the plain model: of each row all tokens that it was given, each a number of its own.

    `lowered` is by how much the positions of each row are lower than its counts of tokens.
    """

    @initialize(
        window_length=strategies.integers(1, 8),
        num_sink_tokens=strategies.integers(0, 7),
        trained_length=strategies.sampled_from(sorted(MODELS)),
        data=strategies.data(),
    )
    def begin(self, window_length, num_sink_tokens, trained_length, data):
        self.window_length = window_length
        self.num_sink_tokens = min(num_sink_tokens, window_length - 1)
        self.model, self.ceiling = MODELS[trained_length], max(self.window_length, trained_length)
        self.cache = SinkCache(self.window_length, self.num_sink_tokens).bind(self.model)
        self.frequencies = self.model.model.rotary_emb.inv_freq.double()
        self.tokens = iter(range(10**9))
        self.forget(data)

    @rule(data=strategies.data())
    def forget(self, data):
        self.cache.reset()
        self.rows = [[] for _ in range(data.draw(strategies.integers(1, 3)))]
        self.pads, self.lowered = [0] * len(self.rows), [0] * len(self.rows)
        self.evicted, self.recording = False, False
        self.latest = 0  # how many columns can be taken back once some evicted others

    @rule(length=strategies.integers(1, 20), data=strategies.data())
    def update(self, length, data):
        start, mask = self.cache.get_seq_length(), None
        at_once = self.ceiling - min(start, self.num_sink_tokens)
        if length > at_once:
            with pytest.raises(ValueError, match=f"at most {at_once} tokens at a time"):
                self.cache.prepare_inputs(torch.zeros(len(self.rows), length, dtype=torch.long))
            return
        if start == 0:
            self.pads = [data.draw(strategies.integers(0, length - 1)) for _ in self.rows]
            columns = torch.arange(length)
            mask = torch.stack([(columns >= pad).long() for pad in self.pads])
        new = [[next(self.tokens) for _ in range(length - (pad if start == 0 else 0))] for pad in self.pads]
        inputs = self.cache.prepare_inputs(torch.zeros(len(self.rows), length, dtype=torch.long), mask)
        positions = inputs["position_ids"].expand(len(self.rows), -1)
        assert 0 <= positions.min() and positions.max() < self.ceiling

        keys = torch.zeros(len(self.rows), 1, length, HEAD_DIM)
        values = torch.full((len(self.rows), 1, length, 1), -1.0)
        for row, tokens in enumerate(new):
            for column, token in enumerate(tokens, length - len(tokens)):
                keys[row, 0, column] = key(token, int(positions[row, column]), self.frequencies)
                values[row, 0, column] = token
        keys, values = self.cache.update(keys, values, 0)

        for row, tokens in enumerate(new):
            for column, sees in self.seen_by(row, tokens, keys.shape[2], length, inputs["attention_mask"]):
                so_far = self.rows[row] + tokens[: column - length + len(tokens) + 1]
                recent = so_far[self.num_sink_tokens :][self.num_sink_tokens - self.window_length :]
                expected = so_far[: self.num_sink_tokens] + recent
                assert sorted(values[row, 0, sees, 0].tolist()) == sorted(expected)
                for place in sees:
                    distance = len(expected) - 1 - expected.index(int(values[row, 0, place, 0]))
                    exact = key(int(values[row, 0, place, 0]), int(positions[row, column]) - distance, self.frequencies)
                    assert (keys[row, 0, place].double() - exact).norm() < 1e-5 * exact.norm()
            self.rows[row] = self.rows[row] + tokens
            self.lowered[row] = len(self.rows[row]) - 1 - int(positions[row, -1])
        self.evicted |= max(map(len, self.rows)) > self.window_length
        room = self.window_length - self.num_sink_tokens
        before = self.latest if self.recording else 0
        self.latest = length if before == 0 else min(before + length, max(room, length))

    def seen_by(self, row, tokens, num_keys, length, mask) -> Iterator[tuple[int, list[int]]]:
        """Each new column of a row that is a token, and the places of the keys that it attends to."""
        for column in range(length - len(tokens), length):
            sees = torch.arange(num_keys) <= num_keys - length + column
            if mask is not None:
                sees = mask.expand(len(self.rows), -1, -1, -1)[row, 0, column] == 0
            yield column, sees.nonzero().flatten().tolist()

    @precondition(lambda self: self.cache.get_seq_length() > 0)
    @rule(data=strategies.data(), how=strategies.sampled_from(["reorder", "select", "repeat"]))
    def rearrange(self, data, how):
        indices = data.draw(strategies.lists(strategies.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        if how == "reorder":
            indices = [indices[row % len(indices)] for row in range(len(self.rows))]
            self.cache.reorder_cache(torch.tensor(indices))
        elif how == "select":
            self.cache.batch_select_indices(torch.tensor(indices))
        else:
            indices = [row for row in range(len(self.rows)) for _ in range(2)] if len(self.rows) < 3 else []
            if not indices:
                return
            self.cache.batch_repeat_interleave(2)
        self.rows, self.pads, self.lowered = (
            [of_rows[row] for row in indices] for of_rows in (self.rows, self.pads, self.lowered)
        )

    @precondition(lambda self: self.cache.get_seq_length() > 0)
    @rule(forgotten=strategies.integers(0, 20))
    def crop(self, forgotten):
        seen = self.cache.get_seq_length()
        possible = self.latest if self.evicted or any(self.lowered) else seen
        if forgotten == seen:
            return  # which is `forget`
        if forgotten > 0 and (forgotten > possible or min(map(len, self.rows)) <= forgotten):
            with pytest.raises(ValueError, match="can forget|must leave a token of each row"):
                self.cache.crop(-forgotten)
            return
        self.cache.crop(max_length=seen - forgotten)
        if forgotten > 0:
            self.rows = [tokens[:-forgotten] for tokens in self.rows]
        self.latest = 0 if self.recording else max(self.latest - forgotten, 0)

    @rule()
    def record(self):
        self.cache.activate_past_recording()
        self.recording = True

    @rule(how=strategies.sampled_from(["copy", "pickle"]))
    def replace_by_a_copy(self, how):
        self.cache = copy.deepcopy(self.cache) if how == "copy" else pickle.loads(pickle.dumps(self.cache))
        self.cache.bind(self.model)

    @invariant()
    def counts_agree(self):
        columns = {len(tokens) + pad for tokens, pad in zip(self.rows, self.pads)}
        assert self.cache.get_seq_length() in columns | {0} and len(columns) == 1
        if self.cache.get_seq_length() > 0:
            assert self.cache.batch_size == len(self.rows)


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(max_examples=60, stateful_step_count=25, derandomize=True, deadline=None)
