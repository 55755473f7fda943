# SPDX-License-Identifier: Apache-2.0
# sink_cache, a `custom_generate` repository: this is its file `custom_generate/generate.py`, which travels alone.
# Documentation and tests are in the repository's other folders.
"""Endless generation in constant memory: attention sinks (arXiv:2309.17453) for decoder-only transformers models.

The cache keeps the first `num_sink_tokens` tokens of a sequence, the sinks, and behind them the latest ones, at most
`window_length` in all. A new token takes the place of the oldest that is no sink:

    window_length = 8, num_sink_tokens = 2      sinks   ring of recent tokens
    slots                                       0  1    2  3  4  5  6  7
    after token 7                               0  1    2  3  4  5  6  7
    after token 10                              0  1    8  9 10  5  6  7

Keys stay as the model rotated them. The sinks alone are rotated anew at each step, so that their positions are those
directly before the oldest recent token. With `kv_bits=8` the ring holds codes: see `CodedRing`. The rest makes this
work for any model, batch, prompt length and release.

Words, each with one meaning:

    column      a place in the input, padding included; of a cache, a place in the keys that it hands out
    token       a column that is no padding; each row counts its own from 0
    slot        a place in the memory of a layer, as drawn above
    position    the number that the model is given for a column, and rotates its keys by
    window      all that is kept: the sinks and the `recent` tokens

A list or a dimension named `rows` has one entry for each row of the batch, or a single one where all rows agree.

Contents: the window, one update of it, and rotations; releases of transformers; layers; a model at rest; standing in
for a model; models that can't be streamed; reading a model; its layers; arguments; refusals; `Stream`, which is a cache
at work; what a model is given for it; the class of transformers<4.53; files; conversations kept between calls;
`SinkCache`; `generate`.
"""

import bisect
import contextlib
import copy
import enum
import errno
import functools
import inspect
import itertools
import json
import math
import operator
import os
import secrets
import stat
import sys
import threading
import types
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import CellType, FunctionType, MethodType
from typing import Any, Optional, Union

import safetensors
import safetensors.torch
import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel

__version__ = "1.0.0"

_logger = transformers.logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# The idea: which tokens are kept, what one update does, and how keys rotate
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Which tokens of a row are kept, and in which slots.

    Token `t` sees the first `num_sinks` tokens and the last `recent` tokens, up to and including itself.

    Args:
        length: the most tokens kept, sinks included (`window_length`).
        num_sinks: how many of them are the first of the row (`num_sink_tokens`).
        bits: in how many each number of the recent tokens is kept (`kv_bits`): 8, or None for as the model made it.
    """

    length: int
    num_sinks: int
    bits: Optional[int] = None

    @property
    def recent(self) -> int:
        """How many of the latest tokens are kept behind the sinks."""
        return self.length - self.num_sinks

    def slot(self, token: int) -> int:
        """The slot of token number `token` of a row."""
        return token if token < self.num_sinks else self.num_sinks + (token - self.num_sinks) % self.recent

    def slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """The slots of `tokens` (int64, any shape). A negative number is no token, and gets any slot."""
        in_ring = self.num_sinks + (tokens - self.num_sinks) % self.recent
        return torch.where((tokens >= 0) & (tokens < self.num_sinks), tokens, in_ring)


class Caller(enum.Enum):
    """Who has the model make an update."""

    UNKNOWN = "nobody has looked at it yet"
    MODEL = "a call of the model by itself, and what it does by itself is right"
    LOOP = "a loop of one's own, by `SinkCache.prepare_inputs`"
    GENERATE = "`generate`, which tells when the update is done"


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of the tokens of a stream where they are not their numbers, as those of an image in two dimensions.

    Such a token has a position on each of several axes. A stream looks at the least of them, and at the largest: text
    after an image goes on at one more than the largest of all before. A token of text has one position on all axes.
    This never changes.

    Args:
        start: the first column of which it knows.
        least: int64 `[rows, columns]` on the CPU, for each column the least of its positions.
        largest: the same, for each column the largest position up to it.
        behind_sinks: int64 `[rows, 1]`, the least position of the first token behind the sinks, if that is no longer
            among these columns.
    """

    start: int
    least: torch.Tensor
    largest: torch.Tensor
    behind_sinks: Optional[torch.Tensor] = None

    @property
    def end(self) -> int:
        """The column after the last of them. After these comes text."""
        return self.start + self.least.shape[1]

    @classmethod
    def of_numbers(cls, end: int, pads: list[int]) -> "Positions":
        """Those of text up to column `end`, which are its numbers."""
        numbers = torch.arange(end, dtype=torch.long, device="cpu")
        numbers = numbers - torch.tensor(pads, dtype=torch.long, device="cpu")[:, None]
        return cls(0, numbers, numbers)

    def of(self, columns: torch.Tensor) -> torch.Tensor:
        """The least position of each of `columns`, int64 `[rows, n]`. Those before `start` get any."""
        return self._look_up(self.least, columns)

    def _look_up(self, known: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What `known`, the least or the largest, is for `columns`: for text at the end, one more with each."""
        rows = max(len(known), len(columns))
        known, columns = known.expand(rows, -1), columns.expand(rows, -1)
        places = (columns - self.start).clamp(0, known.shape[1] - 1)
        return torch.where(columns < self.end, known.gather(1, places), self.largest[:, -1:] + 1 + columns - self.end)

    def after(self, column: int) -> list[int]:
        """`[rows]`, the position that text has which goes on at `column`, behind the first column known."""
        before = torch.tensor([[column - 1]], dtype=torch.long, device="cpu")
        return (self._look_up(self.largest, before)[:, 0] + 1).tolist()

    def up_to(self, end: int) -> "Positions":
        """Those of the columns before `end`."""
        known = end - self.start
        return replace(self, least=self.least[:, :known], largest=self.largest[:, :known])

    def followed_by(self, start: int, positions: torch.Tensor) -> "Positions":
        """These up to column `start`, and then others, `[axes, rows, columns]`."""
        rows, positions = max(len(self.least), positions.shape[1]), positions.to("cpu", torch.long)
        before = torch.arange(self.start, start, dtype=torch.long, device="cpu").expand(rows, -1)
        least = torch.cat([self.of(before), positions.amin(0).expand(rows, -1)], dim=1)
        largest = torch.cat([self._look_up(self.largest, before), positions.amax(0).expand(rows, -1)], dim=1)
        return replace(self, least=least, largest=largest.cummax(dim=1).values)

    def from_column(self, start: int, window: Window, pads: list[int]) -> "Positions":
        """The same without the columns before `start`, in memory of its own."""
        if start <= self.start:
            return self
        start, behind = min(start, self.end - 1), self.of_first_behind(window, pads)
        least, largest = (known[:, start - self.start :].clone() for known in (self.least, self.largest))
        return Positions(start, least, largest, behind)

    def of_first_behind(self, window: Window, pads: list[int]) -> torch.Tensor:
        """The least position of the first token behind the sinks: `[rows, 1]`."""
        if self.behind_sinks is not None:
            return self.behind_sinks
        return self.of(torch.tensor(pads, dtype=torch.long, device="cpu")[:, None] + window.num_sinks)

    def with_rows(self, indices: torch.Tensor) -> "Positions":
        """Those of a batch whose row `i` is row `indices[i]` here."""
        if len(self.least) == 1:
            return self
        least, largest, behind = (
            None if known is None else known.index_select(0, indices.cpu())
            for known in (self.least, self.largest, self.behind_sinks)
        )
        return Positions(self.start, least, largest, behind)


class UpdatePlan:
    """What one update keeps, writes and sees: the same for every layer.

    RoPE sees only differences of positions. So recent keys stay as they are, and the sinks move instead. For token `t`
    they are moved by `t - window.length + 1` positions from where the model put them, which is directly before the
    oldest recent token (arXiv:2309.17453, section 3.2). Where `positions` are not numbers, that is by as much as the
    oldest recent token is behind the first one that followed the sinks.

    - *One token* takes the slot of the token that leaves the window. It sees all slots, with the sinks moved for it.
    - *Several tokens that evict none* see the kept tokens and, causally, each other.
    - *Several tokens that evict* (`sees_copies`) need the sinks in several places. Each new column gets its own copy of
      them. The keys are `[copies, length * num_sinks | recent tokens, num_recent | new tokens, length]`, and a mask
      gives each column its copy and its recent tokens. So the logits are those of tokens that come one by one.

    Args:
        window: which tokens are kept.
        start: columns seen before this update.
        length: columns of this update.
        pads: `[rows]`, the columns of left padding of each row.
        offsets: `[rows]`, by how much a row's positions are lower than its token counts, or than `positions`.
        positions: those of the tokens; None if these are their numbers.
        sees_until: where tokens see later ones, as those of an image do, by the kind of layer in which they do, or for
            None if all are alike: int64 `[rows, length]` on the CPU, for each column the one after the last it sees.
        cycle: where keys are kept in 8 bits, the length of their frames; see `CodedRing`.

    Attributes:
        seen, num_new: `[rows]`, the tokens seen before this update, and the new ones.
        evicts: whether a token leaves a window.
        sink_shifts: `[rows]`, by how many positions the sinks are moved in their slots during this update.
        first_slots: `[rows]`, the slot of the first new token.
        kept: `[rows]`, how many of the tokens seen are still kept beside the new ones.
        num_keys: how many keys the new tokens are given.
        place: how many tokens a model that counts them is told to have been before: as many as are kept, so it counts
            no further than the window is long.
        needs_mask: whether attention must be told which of them each token sees.
        caller: who has the model make the update.
    """

    caller = Caller.UNKNOWN

    def __init__(
        self,
        window: Window,
        start: int,
        length: int,
        pads: list[int],
        offsets: list[int],
        positions: Optional[Positions] = None,
        sees_until: Optional[dict[Optional[str], torch.Tensor]] = None,
        cycle: Optional[int] = None,
    ):
        self.window, self.start, self.length, self.pads, self.offsets = window, start, length, pads, offsets
        self.cycle = cycle
        self.end, self.positions, self.sees_until = start + length, positions, sees_until or {}
        self.seen = [max(start - pad, 0) for pad in pads]
        self.num_new = [min(length, max(self.end - pad, 0)) for pad in pads]
        self.evicts = any(seen + new > window.length for seen, new in zip(self.seen, self.num_new))
        self.sees_copies = self.evicts and length > 1
        self.num_recent = min(max(max(self.seen) - window.num_sinks, 0), window.recent)
        if self.sees_copies:
            self.sink_shifts = [0] * len(pads)  # copies are made of the sinks as the model rotated them
            self.num_keys = length * window.num_sinks + self.num_recent + length
        else:
            moved = [max(seen - window.length + 1, 0) for seen in self.seen]
            if positions is not None:  # of the first token: several move the sinks only where these are copied
                moved = self._moved(torch.tensor(self.seen, dtype=torch.long, device="cpu")[:, None])[:, 0].tolist()
            self.sink_shifts = [shift - offset for shift, offset in zip(moved, offsets)]
            self.num_keys = min(max(self.seen) + 1, window.length) if length == 1 else max(self.seen) + length
        self.place = max(window.length - length, 0) if self.sees_copies else self.num_keys - length
        self.first_slots = [window.slot(seen) for seen in self.seen]
        # For a single token, all rows whose window is full are alike.
        self.kept = [min(seen, window.length - 1) for seen in self.seen] if length == 1 else self.seen
        rows_differ = min(self.kept) < max(self.kept) or min(self.num_new) < length
        self.needs_mask = self.sees_copies or rows_differ or bool(self.sees_until)
        self._indices: dict[torch.device, tuple] = {}
        self._turns: dict[tuple, Optional[torch.Tensor]] = {}
        self._slots_in_order: dict[torch.device, torch.Tensor] = {}

    @property
    def is_prepared(self) -> bool:
        """Whether the model was given positions and a mask for this update."""
        return self.caller in (Caller.LOOP, Caller.GENERATE)

    def tokens(self, first: int, device: torch.device) -> torch.Tensor:
        """The tokens of the columns from `start + first` to the last, negative in padding: int64 `[rows, columns]`."""
        columns = torch.arange(self.start + first, self.end, dtype=torch.long, device=device)
        return columns - torch.tensor(self.pads, dtype=torch.long, device=device)[:, None]

    @functools.cached_property
    def copy_shifts(self) -> torch.Tensor:
        """By how many positions the sinks are moved for each new column: float64 `[rows, length]` on the CPU."""
        moved = self._moved(self.tokens(0, torch.device("cpu")))
        return (moved - torch.tensor(self.offsets, dtype=torch.long, device="cpu")[:, None]).double()

    def _moved(self, tokens: torch.Tensor) -> torch.Tensor:
        """By how many positions the sinks are moved for each of `tokens`, int64 `[rows, n]` on the CPU."""
        if self.positions is None:
            return (tokens - self.window.length + 1).clamp(min=0)
        oldest = tokens - self.window.recent + 1 + torch.tensor(self.pads, dtype=torch.long, device="cpu")[:, None]
        moved = self.positions.of(oldest) - self.positions.of_first_behind(self.window, self.pads)
        return moved.masked_fill(tokens < self.window.length, 0)

    def turns(self, of: str, rotation: "Rotation", device: torch.device) -> Optional[torch.Tensor]:
        """By what the keys in some columns are rotated from their frames to where this update has them.

        Args:
            of: "new", the new columns; "recent", those of `recent_slots`; or "slots", those in each slot after a token.

        Returns:
            float32 `[2, rows, 1, columns, pairs]`, or None if none is rotated. Made once for all layers.
        """
        key = of, id(rotation), device
        if key not in self._turns:
            distances = self._distances_from_frames(of)
            self._turns[key] = None
            if distances.any():
                distances, places = distances.unique(return_inverse=True)  # few: one for each cycle
                self._turns[key] = rotation.turns(distances, device)[:, places.to(device)[:, None]]
        return self._turns[key]

    def _distances_from_frames(self, of: str) -> torch.Tensor:
        """The same in positions: float64 `[rows, columns]` on the CPU."""
        tokens = self.tokens(0 if of == "new" else -self.num_recent, torch.device("cpu"))
        if of == "recent":
            tokens = tokens[:, : self.num_recent]
        elif of == "slots":  # the latest token that goes into each
            slots = torch.arange(self.window.length, dtype=torch.long, device="cpu")
            last = tokens[:, -1:]
            behind = self.window.slots(last) - slots
            tokens = torch.where(slots < self.window.num_sinks, slots, last - behind % self.window.recent)
        positions = tokens
        if self.positions is not None:
            positions = self.positions.of(tokens + torch.tensor(self.pads, dtype=torch.long, device="cpu")[:, None])
        offsets = torch.tensor(self.offsets, dtype=torch.long, device="cpu")[:, None]
        moved = positions - positions % self.cycle - offsets
        return moved.masked_fill(tokens < self.window.num_sinks, 0).double()

    def recent_slots(self, device: torch.device) -> torch.Tensor:
        """The slots of the recent tokens, in order; any slot where a row has fewer: int64 `[rows, num_recent]`."""
        return self._on_device(device)[0]

    def writes(self, device: torch.device) -> tuple[Union[slice, torch.Tensor], torch.Tensor, torch.Tensor]:
        """`rows`, `columns`, `slots`: of the new tokens, `[rows, :, columns]` are kept and go to `[rows, :, slots]`."""
        return self._on_device(device)[1:]

    def _on_device(self, device: torch.device) -> tuple:
        """The indices of the two methods above, made once for all layers of a device."""
        if device not in self._indices:
            self._indices[device] = self._one_token(device) if self.length == 1 else self._several_tokens(device)
        return self._indices[device]

    def _one_token(self, device: torch.device) -> tuple:
        """Indices for a single token, from plain numbers: less work than for several."""
        rows = [row for row, new in enumerate(self.num_new) if new]
        slots = [self.first_slots[row] for row in rows]
        indices = ([], rows, [0] * len(rows), slots)
        return tuple(torch.tensor(each, dtype=torch.long, device=device) for each in indices)

    def _several_tokens(self, device: torch.device) -> tuple:
        """Indices for several tokens; those of them that the same update evicts again are not written."""
        cpu = torch.device("cpu")
        recent, new = self.tokens(-self.num_recent, cpu)[:, : self.num_recent], self.tokens(0, cpu)
        stay = (new < self.window.num_sinks) | (new > new[:, -1:] - self.window.recent)
        rows, columns = ((new >= 0) & stay).nonzero(as_tuple=True)
        slots = self.window.slots(new[rows, columns])
        recent_slots, rows, columns, slots = (
            each.to(device) for each in (self.window.slots(recent), rows, columns, slots)
        )
        return recent_slots, slice(None) if len(self.pads) == 1 else rows, columns, slots

    def local_mask(
        self, kind: str, reach: int, num_keys: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The additive mask of a layer that is given the last `num_keys` columns: `[rows, 1, length, num_keys]`.

        A token sees `reach` tokens, itself included; in "chunked_attention" those of its chunk alone, of so many.
        """
        keys, new = self.tokens(self.length - num_keys, device)[:, None], self.tokens(0, device)[:, :, None]
        near = keys // reach == new // reach if kind == "chunked_attention" else keys > new - reach
        # What sees a later one is seen by that too, however far the layer reaches back.
        return additive_mask(self._with_later((keys >= 0) & (keys <= new) & near, kind, both_ways=True)[:, None], dtype)

    def _with_later(self, sees: torch.Tensor, kind: str, both_ways: bool = False) -> torch.Tensor:
        """`sees`, `[rows, length, keys]` with the new columns last, and which later ones each sees by `sees_until`.

        Where it is `both_ways`, those see it too. The `kind` is that of a layer.
        """
        until = self.sees_until.get(kind, self.sees_until.get(None))
        if until is None:
            return sees
        columns = torch.arange(self.start, self.end, dtype=torch.long, device=sees.device)
        later = (columns < until.to(sees.device)[:, :, None]) & (columns > columns[:, None])
        sees = sees.expand(max(len(sees), len(later)), -1, -1).clone()
        sees[..., -self.length :] |= later | later.mT if both_ways else later
        return sees

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask over the keys that `SinkLayer.update` returns: `[rows, 1, length, num_keys]`."""
        new = self.tokens(0, device)[:, :, None]  # [rows, length, 1]
        if self.length == 1:
            sees = torch.arange(self.num_keys, dtype=torch.long, device=device) <= new
        elif not self.sees_copies:  # keys: tokens 0, 1, ..., filled up where a row has fewer; then the new ones
            seen = torch.tensor(self.seen, dtype=torch.long, device=device)[:, None, None]
            old = torch.arange(max(self.seen), dtype=torch.long, device=device) < seen
            causal = (new.mT <= new) & (new.mT >= 0)
            sees = torch.cat([old.expand(-1, self.length, -1), causal], dim=-1)
        else:
            columns = torch.arange(self.length, dtype=torch.long, device=device)
            copy_of = columns.repeat_interleave(self.window.num_sinks)  # [length * num_sinks]
            sink = torch.arange(self.window.num_sinks, dtype=torch.long, device=device).repeat(self.length)
            own = (copy_of == columns[:, None]) & (sink <= new)
            token = self.tokens(-self.num_recent, device)[:, None]  # [rows, 1, num_recent + length]
            recent = (token >= self.window.num_sinks) & (token <= new) & (token > new - self.window.recent)
            sees = torch.cat([own, recent], dim=-1)
        return additive_mask(self._with_later(sees, "full_attention")[:, None], dtype)

    @functools.cached_property
    def tokens_in_order(self) -> torch.Tensor:
        """The kept and the new tokens, in order and to the right, negative where a row has fewer.

        int64 `[rows, num_keys]` on the CPU, for updates that see no copies.
        """
        kept, seen, new = (
            torch.tensor(counts, dtype=torch.long, device="cpu")[:, None]
            for counts in (self.kept, self.seen, self.num_new)
        )
        places = torch.arange(self.num_keys, dtype=torch.long, device="cpu") + kept + new - self.num_keys
        return torch.where(places < self.window.num_sinks, places, places + seen - kept)

    def slots_in_order(self, device: torch.device) -> torch.Tensor:
        """The slots of these tokens, any slot where a row has fewer: int64 `[rows, num_keys]`."""
        if device not in self._slots_in_order:
            self._slots_in_order[device] = self.window.slots(self.tokens_in_order).to(device)
        return self._slots_in_order[device]

    def mask_in_order(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """The mask of padding over these tokens: int64 `[batch, num_keys]`."""
        if not self.needs_mask:
            return torch.ones(batch_size, self.num_keys, dtype=torch.long, device=device)
        return (self.tokens_in_order >= 0).long().to(device).expand(batch_size, -1)


def additive_mask(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that attention adds to its scores, from whether a key is seen. Finite, so that padding gives no NaN."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer rotates its keys by their position (RoPE, arXiv:2104.09864).

    Args:
        frequencies: `[pairs]`, float64 on the CPU: the radians by which each pair of dimensions rotates per position,
            negative if the model rotates backwards.
        start: the first of the `2 * pairs` neighbouring dimensions of a head that rotate.
        interleaved: whether a pair is two neighbours, or dimensions `i` and `pairs + i` of those that rotate.
        tensor: which cached tensor rotates: "keys", or "values" where latent attention (arXiv:2405.04434) keeps the
            rotating part of its keys.
    """

    frequencies: torch.Tensor
    start: int
    interleaved: bool
    tensor: str

    def __deepcopy__(self, memo: dict) -> "Rotation":
        return self  # it never changes

    def pairs(self, keys: torch.Tensor) -> torch.Tensor:
        """The dimensions of `keys`, `[..., head_dim]`, that rotate: a view, `[..., pairs, 2]`."""
        pairs = self.frequencies.numel()
        rotating = keys[..., self.start : self.start + 2 * pairs]
        return rotating.unflatten(-1, (pairs, 2)) if self.interleaved else rotating.unflatten(-1, (2, pairs)).mT

    def turns(self, distances: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The cosines and sines by which pairs are rotated by `distances`.

        Angles are computed in float64. In float32 their own rounding shows after some ten thousand positions.

        Args:
            distances: a number of positions for each vector of pairs, float64 on the CPU.

        Returns:
            float32 `[2, *distances.shape, pairs]` on `device`.
        """
        angles = distances[..., None] * self.frequencies
        return torch.stack([angles.cos(), angles.sin()]).to(device, torch.float32)

    def rotated(self, pairs: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """`pairs` rotated by `distances`, a number of positions for each vector of pairs.

        Args:
            pairs: of `Rotation.pairs`, in float32: `[..., pairs, 2]`.
            distances: float64 on the CPU, in a shape that broadcasts to the dimensions of `pairs` before the last two.
        """
        if pairs.numel() == 0:  # which has strides of any kind
            return pairs
        angles = distances[..., None] * self.frequencies
        # As one product of complex numbers: fewer kernels than `turned`, and as fast where pairs are contiguous.
        rotations = torch.polar(torch.ones_like(angles), angles).to(pairs.device, torch.complex64)
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotations)

    def rotate_(self, keys: torch.Tensor, distances: list[int]) -> torch.Tensor:
        """Rotate each row of `keys` (`[rows, kv_heads, seq, head_dim]`) in place, with one rounding to their dtype."""
        return self.turn_(keys, self.turns(each_row(distances), keys.device))

    def turn_(self, keys: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotate `keys`, `[..., head_dim]`, in place by `turns`, `[2, ..., pairs]`, with one rounding."""
        pairs = self.pairs(keys)
        for part, states in zip(pairs.unbind(-1), turned(pairs.float(), turns)):
            part.copy_(states)
        return keys


def turned(pairs: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts, `[..., pairs]`, of `pairs`, float32 `[..., pairs, 2]`, rotated by the angles of `turns`."""
    (first, second), (cosines, sines) = pairs.unbind(-1), turns
    return first * cosines - second * sines, first * sines + second * cosines


def distances(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """By how much the numbers of `[rows]` rise from `before` to `after`."""
    rows = max(len(before), len(after))
    before, after = (counts if len(counts) == rows else [*counts] * rows for counts in (before, after))
    return [new - old for old, new in zip(before, after)]


def numbers_of_rows(numbers: Sequence[int], indices: torch.Tensor) -> list[int]:
    """The numbers of `[rows]` of a batch whose row `i` was row `indices[i]`. To look at these waits for the device."""
    return list(numbers) if len(numbers) == 1 else [numbers[row] for row in indices.tolist()]


def each_row(distances: list[int]) -> torch.Tensor:
    """The distances of `[rows]` as float64 `[rows, 1, 1]`, which broadcasts to heads and tokens."""
    return torch.tensor(distances, dtype=torch.float64, device="cpu")[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Releases of transformers, 4.52 to 5.24: what differs between them
# ---------------------------------------------------------------------------------------------------------------------

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])

# The newest release that the tests run on. Those that only repair it have the same first two numbers.
NEWEST_TESTED = "5.24.0"
if RELEASE > tuple(int(number) for number in NEWEST_TESTED.split(".")[:2]):
    # By transformers' own logger: this module's differs between a copy of the Hub and the installed one.
    transformers.logging.get_logger("transformers").warning_once(
        f"sink_cache was tested with transformers up to {NEWEST_TESTED} and not with {transformers.__version__}, so if "
        f"something fails or looks wrong, try it with {NEWEST_TESTED} too."
    )

try:
    from transformers.cache_utils import CacheLayerMixin
except ImportError:  # until 4.53 a cache has no layer objects
    CacheLayerMixin = object

# Until 4.53 a model makes its mask for all tokens seen and uses its first columns. Once tokens are evicted, that is
# wrong.
MASKS_FOLLOW_THE_CACHE = CacheLayerMixin is not object

# What a cache without a limit answers where it is asked for one.
NO_LIMIT = -1 if MASKS_FOLLOW_THE_CACHE else None

# What models, their outputs and `generate` call a cache. From 5.24 on users may still use the older name, and code that
# comes with a model may know no other. This `generate` takes both names on all releases.
OLDER_NAME, NEWER_NAME = "past_key_values", "cache"
CACHE = NEWER_NAME if RELEASE >= (5, 24) else OLDER_NAME

# Until 5.3 a model is told which columns are new (`cache_position`). Later ones ask the cache how many it has seen.
TELLS_COLUMNS = RELEASE < (5, 4)
# Until then, and some releases further on, one count of columns is for the masks of all kinds of layers.
COUNTS_BY_LAYER = hasattr(Cache, "get_query_offset")

# 4.52 configurations have no `layer_types`. This attribute marks those with layers of several kinds.
HYBRID_MARKER = "cache_implementation"

# The kinds of layers (`layer_types`) that the release's own cache keeps apart; None if it does so for all its models.
CACHED_KINDS: Optional[set[str]] = {"full_attention"}
# Its classes of layers that attend to all tokens, and of those that stay as they are in a stream, because they slide,
# keep a state or hold nothing.
FULL_LAYERS, UNTOUCHED_LAYERS = ["DynamicLayer"], []
if RELEASE >= (4, 56):
    CACHED_KINDS |= {"sliding_attention", "chunked_attention"}
    UNTOUCHED_LAYERS += ["DynamicSlidingWindowLayer", "DummyLayer"]
if RELEASE >= (5, 15):  # until then models lose a state when they get several tokens at once
    from transformers.cache_utils import LinearAttentionLayer as StateLayer

    CACHED_KINDS = None
    FULL_LAYERS += ["LinearAttentionAndFullAttentionLayer", "DynamicIndexedLayer"]
    UNTOUCHED_LAYERS += ["LinearAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"]
else:

    class StateLayer:
        """No layer keeps a state."""


# torch 2.6 can't compile what 5.2 and later put around a model's code, with any cache.
CAN_COMPILE = RELEASE < (5, 2) or TORCH >= (2, 7)

# What `Cache.crop` calls its argument: how many tokens stay ("max_length") or, in newer releases, minus how many go.
CROP_ARGUMENT = list(inspect.signature(DynamicCache.crop).parameters)[1]

# The method by which `generate`, from 5.3 on, makes positions before its loop.
MAKES_POSITIONS = tuple(vars(transformers.GenerationMixin).keys() & {"_prepare_position_ids_for_generation"})

# Decoding modes that the release loads from repositories of the Hub, by the argument that asks for each.
MOVED_MODES = {}
if RELEASE >= (4, 56):
    MOVED_MODES |= {"dola_layers": "DoLa"}
if RELEASE >= (4, 57):
    MOVED_MODES |= {"num_beam_groups": "group beam search", "constraints": "constrained beam search"}
    MOVED_MODES |= {"force_words_ids": "constrained beam search"}

# Arguments about the custom function itself, which `generate` hands on to it: these three in 4.52 only,
ABOUT_THE_CALL = ("custom_generate", "trust_remote_code", "global_keys_to_exclude")
# and these, which say where on the Hub it is, in every release.
WHERE_ON_THE_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "repo_type")
ABOUT_THE_CALL += WHERE_ON_THE_HUB


def init_cache(cache: Cache) -> None:
    """Call `Cache.__init__` with the arguments of the release."""
    parameters = inspect.signature(Cache.__init__).parameters
    if "layers" in parameters:  # from 4.56
        Cache.__init__(cache, layers=[])
    elif "layer_classes" in parameters:  # 4.54 and 4.55 make a first layer at once
        Cache.__init__(cache, layer_classes=transformers.cache_utils.DynamicLayer)
    else:
        Cache.__init__(cache)


def default_cache(config: Any) -> DynamicCache:
    """The cache that transformers itself gives a model. Until 4.55 it knows no kinds of layers, and has none yet."""
    if not UNTOUCHED_LAYERS:
        return DynamicCache()
    config = config.get_text_config(decoder=True)
    # Up to 5.8 at least it makes layers for `[:-num_kv_shared_layers]`, none if that is 0.
    if RELEASE < (5, 17) and getattr(config, "num_kv_shared_layers", None) == 0:
        config = copy.copy(config)
        config.num_kv_shared_layers = -config.num_hidden_layers
    return DynamicCache(config=config)


def default_layers(model: PreTrainedModel) -> list:
    """The layers of that cache; empty in releases that know no kinds of them."""
    return default_cache(model.config).layers if UNTOUCHED_LAYERS else []


def cache_name(function: Callable) -> str:
    """By which name a function takes a cache."""
    names = inspect.signature(function).parameters
    return OLDER_NAME if OLDER_NAME in names and CACHE not in names else CACHE


def keys_and_values(cache: DynamicCache) -> list[dict[str, torch.Tensor]]:
    """The `keys` and `values` of each layer, `[batch, kv_heads, seq, head_dim]`; empty for a layer without.

    Beside them may be `indexer_keys`, `[batch, 1, seq, index_dim]`, by which attention chooses its tokens.
    """
    if not MASKS_FOLLOW_THE_CACHE:
        kept = zip(cache.key_cache, cache.value_cache)
        return [{} if keys is None else {"keys": keys, "values": values} for keys, values in kept]
    cached = []
    for layer in cache.layers:
        tensors = {name: getattr(layer, name, None) for name in ("keys", "values")}
        if getattr(layer, "indexer_keys", None) is not None:
            tensors["indexer_keys"] = layer.indexer_keys.unsqueeze(1)
        if getattr(layer, "indexer_position_ids", None) is not None:
            raise ValueError("its layers cache more than keys and values (the positions of an index)")
        cached.append({} if tensors["keys"] is None else tensors)
    return cached


def layer_classes(layers: list) -> set[str]:
    """The names of the classes of some of transformers' own layers."""
    return {type(layer).__name__ for layer in layers}


def keeps_state(layer: Any) -> bool:
    """Whether one of transformers' own layers keeps a recurrent state."""
    return isinstance(layer, StateLayer)


def layer_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """What one of transformers' own layers keeps, by name: keys, values and recurrent states."""
    tensors = {name: getattr(layer, name, None) for name in ("keys", "values")}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None} | states_of(layer)


def states_of(layer: Any) -> dict[str, torch.Tensor]:
    """The recurrent states that a layer keeps, by name."""
    tensors = {}
    for name in ("conv_states", "recurrent_states"):
        tensors |= {f"{name}.{state_idx}": state for state_idx, state in getattr(layer, name, {}).items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def set_columns(kwargs: dict[str, Any], start: int, end: int, device: torch.device) -> None:
    """Tell the model which columns are new. Until 5.3 `generate` counts them, wrongly if it gets new tokens only."""
    if "cache_position" in kwargs:
        kwargs["cache_position"] = torch.arange(start, end, dtype=torch.long, device=device)


def is_synced(model: PreTrainedModel, synced_gpus: Optional[bool]) -> bool:
    """Whether `generate` will keep the ranks of a distributed model in step, by its own rule."""
    if synced_gpus is not None:
        return bool(synced_gpus)
    utils, distributed = transformers.generation.utils, torch.distributed
    sharded = utils.is_deepspeed_zero3_enabled() or utils.is_fsdp_managed_module(model)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return sharded and several


def query_length(sizes: Union[torch.Tensor, int]) -> int:
    """How many new tokens `get_mask_sizes` is asked about: it gets their positions until 5.3, their number later."""
    return sizes.shape[0] if isinstance(sizes, torch.Tensor) else sizes


def num_keys_of(layer: Any, length: int) -> int:
    """How many keys one of transformers' own layers returns for `length` new tokens."""
    sizes = torch.arange(length, dtype=torch.long, device="cpu") if TELLS_COLUMNS else length
    return layer.get_mask_sizes(sizes)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Layers: the keys and values kept
# ---------------------------------------------------------------------------------------------------------------------

# An error or an interrupt may come at any line. The next call must then go on rightly, or be refused. So:
#
# - *What takes another's place is made first, then exchanged in one assignment*: other rows, another device.
# - *What is written into slots is noted first.* The next call writes it again, which does no harm, or puts back what
#   was there. `Undo` notes new tokens, `Lowered` keys on their way to lower positions, and `Ring.sinks` the sinks.
# - *A count moves last where tokens come, and first where they go.* In between, a layer's `undo` ends at another column
#   than the layer has `seen`. That tells `Stream.settle` what to take back.


Tensors = dict[str, torch.Tensor]  # by name


def shared(thing: Any) -> Any:
    """An object that shares all of `thing`: what is set on it is not set on that."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


@dataclass(frozen=True, eq=False)
class Lowered:
    """How far the recent keys of a ring are lowered, and what is just being written of them.

    Args:
        offsets: `[rows]`, by how many positions all of them are lower than where the model put them.
        target: `[rows]`, the offsets on the way to which they are; None if they are on no way.
        layer: the layer of the ring that is being written then. Those before it are at the target.
        rotating: what is being written, `[batch, kv_heads, recent, pairs, 2]`.
    """

    offsets: list[int]
    target: Optional[list[int]] = None
    layer: int = 0
    rotating: Optional[torch.Tensor] = None


class Ring:
    """The slots of equal layers in one piece of memory, so that the sinks of all are moved together, once a step.

    In the slots, keys and values are as the model made them. `CodedRing` has fewer bits there.

    Args:
        window: which tokens are kept, and in which slots.
        rotation: how these layers rotate their keys; None if they don't.

    Attributes:
        num_layers: how many layers have slots here.
        slots: what is kept of tokens, by name: `[layers, batch, kv_heads, window.length, ...]`. Here it is "keys" and
            "values" with `head_dim`. Empty before the first token.
        apart: what else is kept, by name: `[layers, batch, kv_heads, ...]`. Nothing here, as sinks are in their slots.
        pristine: float32 `[layers, batch, kv_heads, sinks, pairs, 2]`, what rotates of the sinks as the model made it.
            It is valid from the time when the sinks are first moved. None if nothing rotates.
        shifts: `[rows]`, by how many positions the sinks are moved; None while they are being moved.
        lowered: by how many the recent keys are.
        rows, next_slots: int64 `[batch]`, where compiled code writes each row's token.
    """

    def __init__(self, window: Window, rotation: Optional[Rotation]):
        self.window, self.rotation = window, rotation
        self.num_layers = 0
        self.slots: Tensors = {}
        self.apart: Tensors = {}
        self.pristine = self.rows = self.next_slots = None
        self.shifts: list[Optional[int]] = [0]
        self.lowered = Lowered([0])

    @torch.inference_mode(False)
    def allocate(self, states: Tensors) -> None:
        """Make room for keys and values like these, by name: `[batch, kv_heads, seq, head_dim]`."""
        slots, apart = self._room_for(states)
        pristine = None
        if self.rotation is not None:
            rotating = states[self.rotation.tensor]
            like = rotating.new_empty(self.num_layers, *rotating.shape[:2], self.window.num_sinks, rotating.shape[-1])
            pristine = torch.zeros(self.rotation.pairs(like).shape, dtype=torch.float32, device=like.device)
        self._exchange(slots, apart, pristine)

    def _room_for(self, states: Tensors) -> tuple[Tensors, Tensors]:
        """New `slots` for `states`, and what lies `apart`."""
        return self._zeros(states, self.window.length), {}

    def _zeros(self, states: Tensors, number: int, dtype: Optional[torch.dtype] = None) -> Tensors:
        """Zeros for so many tokens of each layer, `[layers, batch, kv_heads, number, head_dim]`."""
        return {
            name: each.new_zeros(self.num_layers, *each.shape[:2], number, each.shape[-1], dtype=dtype)
            for name, each in states.items()
        }

    def _exchange(self, slots: Tensors, apart: Tensors, pristine: Optional[torch.Tensor], **others: Any) -> None:
        """Keep tokens in these tensors from now on, and have these `others` of its attributes, all at once."""
        keys = slots["keys"]
        rows = torch.arange(keys.shape[1], dtype=torch.long, device=keys.device)
        next_slots = torch.zeros_like(rows)
        mark_static(rows, next_slots)
        vars(self).update(slots=slots, apart=apart, pristine=pristine, rows=rows, next_slots=next_slots, **others)

    @property
    def sinks(self) -> Tensors:
        """The sinks as tokens see them, by name: `[layers, batch, kv_heads, sinks, head_dim]`, views."""
        return {name: each[:, :, :, : self.window.num_sinks] for name, each in self.slots.items()}

    def place_sinks(self, shifts: list[int]) -> None:
        """Move each row's sinks to `shifts` positions from where the model put them, if they are not there."""
        moves = shifts != self.shifts and (any(shifts) or any(shift != 0 for shift in self.shifts))
        if not moves or self.rotation is None or self.window.num_sinks == 0:
            return
        rotating = self.rotation.pairs(self.sinks[self.rotation.tensor])
        if 0 in self.shifts:  # in some rows they move for the first time
            unmoved = torch.tensor([shift == 0 for shift in self.shifts], dtype=torch.bool, device=rotating.device)
            self.pristine.copy_(torch.where(unmoved[:, None, None, None, None], rotating.float(), self.pristine))
        self.shifts = [None] * len(shifts)  # after an interrupt, `pristine` still has them as the model made them
        rotating.copy_(self.rotation.rotated(self.pristine, each_row(shifts)))
        self.shifts = shifts

    def lower_positions(self, offsets: list[int]) -> None:
        """Lower the positions of the recent keys to `offsets` (`[rows]`) below those that the model gave them.

        The sinks follow when they are next placed. What an interrupt cut short before is finished first.
        """
        if self.lowered.target is not None:
            self._lower_to(self.lowered.target)
        if self.lowered.offsets != offsets:
            self._lower_to(offsets)

    @torch.inference_mode(False)
    def _lower_to(self, offsets: list[int]) -> None:
        """Lower the recent keys layer by layer, for less memory, from the layer at which that was cut short on."""
        back = [-distance for distance in distances(self.lowered.offsets, offsets)]
        if self.rotation is not None and self.slots and any(back):
            recent = self.rotation.pairs(self.slots[self.rotation.tensor][:, :, :, self.window.num_sinks :])
            for layer in range(self.lowered.layer, self.num_layers):
                if self.lowered.target is None or self.lowered.layer < layer:
                    rotating = self.rotation.rotated(recent[layer].float(), each_row(back))
                    self.lowered = replace(self.lowered, target=offsets, layer=layer, rotating=rotating)
                recent[layer].copy_(self.lowered.rotating)
        self.lowered = Lowered(offsets)

    @torch.inference_mode(False)
    def part(self, index: int, states: Tensors) -> "Ring":
        """A ring of its own for the layer at `index`, on the device and in the dtype of states like these."""
        ring, part = shared(self), slice(index, index + 1)
        pristine = None if self.pristine is None else self.pristine[part].to(states["keys"].device, copy=True)
        ring._exchange(*ring._moved_to(states, part), pristine, num_layers=1)
        return ring

    def _moved_to(self, states: Tensors, part: slice) -> tuple[Tensors, Tensors]:
        """`slots` and `apart` of some layers, where and as such states are."""
        return {name: each[part].to(states[name], copy=True) for name, each in self.slots.items()}, {}

    def with_rows(self, indices: torch.Tensor) -> "Ring":
        """A copy whose row `i` of the batch is row `indices[i]` here."""
        ring = shared(self)
        ring.shifts = numbers_of_rows(self.shifts, indices)
        ring.lowered = Lowered(numbers_of_rows(self.lowered.offsets, indices))
        if self.slots:
            rows = indices.to(self.rows.device)
            slots, apart = (
                {name: each.index_select(1, rows) for name, each in tensors.items()}
                for tensors in (self.slots, self.apart)
            )
            ring._exchange(slots, apart, None if self.pristine is None else self.pristine.index_select(1, rows))
        return ring

    def tensors(self) -> list[torch.Tensor]:
        """All that holds something of a token."""
        others = (each for each in (self.pristine, self.lowered.rotating) if each is not None)
        return [*self.slots.values(), *self.apart.values(), *others]

    # What one of its layers keeps of tokens. `slots` and `apart` are those of this layer from here on.

    def encode(self, states: Tensors, apart: Tensors, plan: UpdatePlan) -> Tensors:
        """What is kept of new tokens, from their keys and values, `[batch, kv_heads, length, head_dim]` by name.

        Returns:
            By the names of `slots`: `[batch, kv_heads, length, ...]`.
        """
        return states

    def write(self, slots: Tensors, new: Tensors, plan: UpdatePlan) -> None:
        """Put into the `slots` of a layer what is kept of the `new` tokens."""
        if plan.length == 1 and plan.num_new == [1]:  # plain decoding: a view is faster than an index
            slot = slice(plan.first_slots[0], plan.first_slots[0] + 1)
            for name, each in new.items():
                slots[name][:, :, slot] = each
        elif plan.length == 1 and min(plan.num_new) == 1:  # as all rows are new, two indices less
            rows, _, places = plan.writes(self.rows.device)
            for name, each in new.items():
                slots[name][rows, :, places] = each[:, :, 0]
        else:
            rows, columns, places = plan.writes(self.rows.device)
            for name, each in new.items():
                slots[name][rows, :, places] = each[rows, :, columns]

    def expect(self, tensors: Tensors) -> None:
        """Before room is made, know what a file holds of a layer."""

    def write_sinks(self, apart: Tensors, states: Tensors, plan: UpdatePlan) -> None:
        """Keep those of the new tokens that are sinks, if they lie apart."""

    def decode(self, kept: Tensors, apart: Tensors, plan: Optional[UpdatePlan], columns: str) -> Tensors:
        """What `kept` is as tokens see it, by name: `[batch, kv_heads, n, head_dim]`.

        Args:
            kept: of `n` columns, or of the first `n` slots.
            plan: of the update; None for keys in their frames.
            columns: which these are; see `UpdatePlan.turns`. The first slots are the sinks'.
        """
        return kept

    def as_seen(self, states: Tensors, new: Tensors, apart: Tensors, plan: UpdatePlan) -> Tensors:
        """The keys and values of new tokens as tokens see them, of which `encode` made `new`."""
        return states

    def prepare_compiled(self, plan: UpdatePlan) -> None:
        """Before a compiled step, see to all that is not arithmetic on tensors."""
        self.place_sinks(plan.sink_shifts)
        self.next_slots.copy_(torch.tensor(plan.first_slots, dtype=torch.long, device="cpu"))

    def write_compiled(self, slots: Tensors, apart: Tensors, states: Tensors) -> Tensors:
        """Take in one token of each row, by arithmetic on tensors alone, and return what is in all slots."""
        self._write_next(slots, states)
        return slots

    def _write_next(self, slots: Tensors, new: Tensors) -> None:
        """Put into `next_slots` what is kept of one token of each row."""
        for name, each in new.items():
            slots[name][self.rows, :, self.next_slots] = each[:, :, 0]


class CodedRing(Ring):
    """A `Ring` that keeps recent tokens in 8 bits (`kv_bits=8`), and the sinks apart as the model made them.

    A token's key, and its value, is int8 codes times one scale for each head, which is its largest number / 127. The
    scale is bfloat16, and the codes are chosen for it as it is rounded. New tokens see themselves and each other in
    this form too, as later ones will. So what a token is in the cache is a rule of the token alone.

    *Frames.* To rotate codes would round them again. So a key is coded as it is in a frame that follows from its
    position alone, `position % cycle`, and never changes. What is read is rotated from the frames to where an update
    has the keys. The offsets of a stream are multiples of the cycle where they can be. Then only keys that are older
    than the latest multiple are rotated, while these are in the window.

    *Channels that stand out.* In some models a few channels of the keys are much larger than all others, whose codes
    would be few. What `read_factors` finds of them divides the numbers first, by powers of two, which rounds nothing.

    Attributes:
        factors: of each layer, `[kv_heads, head_dim]` by name; see `ModelTraits.factors`.
        apart: the sinks as tokens see them, `[.., sinks, head_dim]`, by names with "sink_"; and where there are
            factors, these by names with "_factor", `[.., 1, head_dim]`.
        slots: int8 codes by the names "keys" and "values", and bfloat16 scales, `[..., 1]`, by those with "_scale".
            Those in the slots of the sinks are not read.
        turns: float32 `[2, rows, 1, window.length, pairs]`, by what compiled code rotates the keys in each slot.
            None before the first compiled step.
    """

    turns: Optional[torch.Tensor] = None
    are_turned = False  # whether `turns` rotates any

    def __init__(self, window: Window, rotation: Optional[Rotation]):
        super().__init__(window, rotation)
        self.factors: list[Tensors] = []

    def _room_for(self, states: Tensors) -> tuple[Tensors, Tensors]:
        scales = {f"{name}_scale": each[..., :1] for name, each in states.items()}
        slots = self._zeros(states, self.window.length, torch.int8)
        slots |= self._zeros(scales, self.window.length, torch.bfloat16)
        sinks = self._zeros({f"sink_{name}": each for name, each in states.items()}, self.window.num_sinks)
        return slots, sinks | self._factors_for(states)

    def expect(self, tensors: Tensors) -> None:
        if not self.slots:  # all layers have room for factors that one has
            factors = {name: tensors[f"{name}_factor"][0, :, 0] for name in tensors if f"{name}_factor" in tensors}
            self.factors = [factors] * self.num_layers

    def _factors_for(self, states: Tensors) -> Tensors:
        """The factors of each layer, `[layers, batch, kv_heads, 1, head_dim]`, by names with "_factor"."""
        factors = {}
        for name, each in states.items():
            if any(name in of_layer for of_layer in self.factors):
                ones = each.new_ones(each.shape[1], each.shape[-1], dtype=torch.float32)
                of_layers = torch.stack([of_layer.get(name, ones).to(ones) for of_layer in self.factors])
                factors[f"{name}_factor"] = of_layers[:, None, :, None].repeat(1, len(each), 1, 1, 1)
        return factors

    def _moved_to(self, states: Tensors, part: slice) -> tuple[Tensors, Tensors]:
        device, like = states["keys"].device, {f"sink_{name}": each for name, each in states.items()}
        slots = {name: each[part].to(device, copy=True) for name, each in self.slots.items()}
        return slots, {name: each[part].to(like.get(name, device), copy=True) for name, each in self.apart.items()}

    def _exchange(self, *tensors: Any, **others: Any) -> None:
        super()._exchange(*tensors, turns=None, **others)

    @property
    def sinks(self) -> Tensors:
        return {name.removeprefix("sink_"): each for name, each in self.apart.items() if name.startswith("sink_")}

    def lower_positions(self, offsets: list[int]) -> None:
        """Nothing is written: what is read is rotated."""

    def encode(self, states: Tensors, apart: Tensors, plan: UpdatePlan) -> Tensors:
        new = {}
        for name, each in states.items():
            numbers, turns = each.float(), self._turns(name, plan, "new")
            if turns is not None:
                numbers = self.rotation.turn_(numbers.clone(), torch.stack([turns[0], -turns[1]]))
            new |= self._in_codes(name, numbers, apart)
        return new

    @staticmethod
    def _in_codes(name: str, numbers: torch.Tensor, apart: Tensors) -> Tensors:
        """The codes of float32 `numbers`, `[batch, kv_heads, length, head_dim]`, and their scale, by name.

        Where one of the numbers is not finite, the scale is not, and all are read as NaN.
        """
        if f"{name}_factor" in apart:
            numbers = numbers / apart[f"{name}_factor"]
        scale = numbers.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.bfloat16).tiny)
        scale = scale.to(torch.bfloat16)
        return {name: (numbers / scale).round_().clamp_(-127, 127).to(torch.int8), f"{name}_scale": scale}

    def write_sinks(self, apart: Tensors, states: Tensors, plan: UpdatePlan) -> None:
        if min(plan.seen) < self.window.num_sinks:
            rows, columns, places = plan.writes(self.rows.device)
            rows = rows if len(plan.pads) > 1 else slice(None)
            for name, each in states.items():
                # Those that are no sinks go into a slot more, which is dropped.
                more = torch.nn.functional.pad(apart[f"sink_{name}"], (0, 0, 0, 1))
                more[rows, :, places.clamp(max=self.window.num_sinks)] = each[rows, :, columns]
                apart[f"sink_{name}"].copy_(more[:, :, :-1])

    def decode(self, kept: Tensors, apart: Tensors, plan: Optional[UpdatePlan], columns: str) -> Tensors:
        names = [name for name in ("keys", "values") if name in kept]
        return {
            name: self._numbers(name, kept, apart, self._turns(name, plan, columns), columns == "slots")
            for name in names
        }

    def as_seen(self, states: Tensors, new: Tensors, apart: Tensors, plan: UpdatePlan) -> Tensors:
        numbers = self.decode(new, apart, plan, "new")
        if min(plan.seen) < self.window.num_sinks:
            tokens = plan.tokens(0, self.rows.device)
            whole = ((tokens >= 0) & (tokens < self.window.num_sinks))[:, None, :, None]
            numbers = {name: torch.where(whole, states[name], each) for name, each in numbers.items()}
        return numbers

    @torch.inference_mode(False)
    def prepare_compiled(self, plan: UpdatePlan) -> None:
        super().prepare_compiled(plan)
        if self.rotation is None:
            return
        turns, rows = plan.turns("slots", self.rotation, self.rows.device), len(plan.pads)
        if self.turns is None:
            pairs = self.rotation.frequencies.numel()
            shape = 2, rows, 1, self.window.length, pairs
            self.turns = torch.zeros(shape, dtype=torch.float32, device=self.rows.device)
            mark_static(self.turns)
        elif turns is None and not self.are_turned:
            return
        self.are_turned = turns is not None
        if turns is None:
            self.turns[0], self.turns[1] = 1, 0
        else:
            self.turns.copy_(turns)

    def write_compiled(self, slots: Tensors, apart: Tensors, states: Tensors) -> Tensors:
        new, seen = {}, {}
        for name, each in states.items():
            new |= self._in_codes(name, each.float(), apart)
        self._write_next(slots, new)
        for name, each in states.items():
            numbers = slots[name].float() * slots[f"{name}_scale"]
            if f"{name}_factor" in apart:
                numbers = numbers * apart[f"{name}_factor"]
            if self.rotation is not None and self.rotation.tensor == name:
                self.rotation.turn_(numbers, self.turns)
            seen[name] = numbers.to(each.dtype)
            if self.window.num_sinks > 0:
                place = self.next_slots.clamp(max=self.window.num_sinks - 1)
                is_sink = (self.next_slots < self.window.num_sinks)[:, None, None]
                sinks = apart[f"sink_{name}"]
                sinks[self.rows, :, place] = torch.where(is_sink, each[:, :, 0], sinks[self.rows, :, place])
                seen[name][:, :, : self.window.num_sinks] = sinks
        return seen

    def _turns(self, name: str, plan: Optional[UpdatePlan], columns: str) -> Optional[torch.Tensor]:
        """`plan.turns` if `name` is what rotates."""
        if plan is None or self.rotation is None or self.rotation.tensor != name:
            return None
        return plan.turns(columns, self.rotation, self.rows.device)

    def _numbers(
        self,
        name: str,
        kept: Tensors,
        apart: Tensors,
        turns: Optional[torch.Tensor],
        by_slot: bool,
    ) -> torch.Tensor:
        """The keys or values in `kept`, with the sinks in the first slots if it is `by_slot`."""
        codes, scale, factor = kept[name], kept[f"{name}_scale"], apart.get(f"{name}_factor")
        sinks = apart[f"sink_{name}"]
        dtype = sinks.dtype if turns is None else torch.float32
        numbers = torch.empty(codes.shape, dtype=dtype, device=codes.device).copy_(codes).mul_(scale)
        if factor is not None:
            numbers.mul_(factor)
        if turns is not None:
            numbers = self.rotation.turn_(numbers, turns[:, :, :, : codes.shape[2]]).to(sinks.dtype)
        if by_slot:
            number = min(sinks.shape[2], codes.shape[2])
            numbers[:, :, :number] = sinks[:, :, :number]
        return numbers


def mark_static(*tensors: torch.Tensor) -> None:
    """Let CUDA graphs write into these tensors. Without a guard, another cache's tensors use the same code."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)


def gather_slots(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What `buffer`, `[batch, kv_heads, window.length, head_dim]`, has in `slots`, `[rows, n]`: `[.., n, head_dim]`."""
    if len(slots) == 1:  # copies whole tokens, several times as fast
        return buffer.index_select(2, slots[0])
    batch, heads, _, head_dim = buffer.shape
    return buffer.gather(2, slots[:, None, :, None].expand(batch, heads, -1, head_dim))


@dataclass(frozen=True, eq=False)
class Undo:
    """What a layer needs to take its latest tokens back: the tokens that they evicted.

    Args:
        end: the column after the latest token. It is another than the layer has seen while an update, or taking back,
            is under way.
        columns: how many columns can be taken back.
        evicted: by the names of `Ring.slots`, `[batch, kv_heads, evicted, ...]`, the latest last. None if nothing of it
            is needed: what a single token evicts is not seen by the next one either.
        offsets: `[rows]`, by how many positions these keys are lowered.
    """

    end: int
    columns: int
    evicted: Optional[Tensors] = None
    offsets: tuple[int, ...] = (0,)

    def at(self, offsets: list[int], rotation: Optional[Rotation]) -> "Undo":
        """The same with keys that are lowered to `offsets`."""
        back = [-distance for distance in distances(self.offsets, offsets)]
        evicted = self.evicted
        if evicted is not None and rotation is not None and any(back):
            evicted = evicted | {rotation.tensor: rotation.rotate_(evicted[rotation.tensor].clone(), back)}
        return replace(self, evicted=evicted, offsets=tuple(offsets))

    def with_rows(self, indices: torch.Tensor) -> "Undo":
        """The same of a batch whose row `i` is row `indices[i]` here."""
        evicted = self.evicted
        if evicted is not None:
            evicted = {name: each.index_select(0, indices.to(each.device)) for name, each in evicted.items()}
        return replace(self, evicted=evicted, offsets=tuple(numbers_of_rows(self.offsets, indices)))


class SinkLayer(CacheLayerMixin):
    """The sinks and the recent tokens of one attention layer, in a `Ring` shared with equal layers.

    A `Stream` asks the same of layers of any kind: the attributes from `follows_plan` on, and the methods. So another
    kind is a class of its own, and a line in `make_layers`.

    Attributes:
        slots, apart, sinks: its own of the ring's: views, `[batch, kv_heads, ...]`.
        seen: the columns seen.
        undo: what can be taken back.
        record_past: whether what is evicted is kept until `take_back`, over several updates too.
        follows_plan: whether a `Stream` plans its updates (`UpdatePlan`). If not, transformers' own code makes them.
        compiles: whether compiled code can write a token into it.
        has_kind: whether models give it a mask of its own, for its kind of layer.
        can_record: whether it can, told to, keep what is needed to take tokens back.
        can_undo: whether it can take an update back, also one that was cut short.
        counts_columns: whether it knows how many columns it has seen.
        is_indexed: whether it has an index by which it chooses tokens.
        shows_progress: whether `progress` tells of an update that was cut short.
    """

    is_sliding = False
    is_croppable = True  # what assisted decoding asks from 5.24 on
    follows_plan = compiles = can_record = can_undo = counts_columns = shows_progress = True
    has_kind = is_indexed = False

    def __init__(self, ring: Ring):
        self.ring, self.index = ring, ring.num_layers
        self.slots, self.apart, self.sinks = {}, {}, {}
        ring.num_layers += 1
        self.seen = 0
        self.undo = Undo(end=0, columns=0)
        self.record_past = False
        self.is_initialized = False

    @property
    def keys(self) -> Optional[torch.Tensor]:
        """`[batch, kv_heads, window.length, head_dim]` by slots; None before the first token."""
        return self.numbers().get("keys")

    @property
    def values(self) -> Optional[torch.Tensor]:
        """The same of values."""
        return self.numbers().get("values")

    def numbers(self, plan: Optional[UpdatePlan] = None) -> Tensors:
        """The keys and values in all slots as tokens see them after the update of `plan`, or in their frames."""
        return self.ring.decode(self.slots, self.apart, plan, "slots")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("slots", "apart", "sinks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, slots={}, apart={}, sinks={})
        if self.is_initialized:
            self._use(self.ring, self.index)  # a copied view would be none

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As `take_in` does it for the first tokens."""
        self._have_slots_for({"keys": key_states, "values": value_states})

    def _have_slots_for(self, states: Tensors) -> None:
        """Have slots for keys and values like these, by name: `[batch, kv_heads, seq, head_dim]`, on their device.

        The layers of a ring may come to lie on several devices, or to have several dtypes. A layer that does not fit to
        the ring leaves it, with what is its own, and the others stay what they are.
        """
        ring, index = self.ring, self.index
        if not ring.slots:
            ring.allocate(states)
        elif not self._fit(ring.sinks, states):
            ring, index = ring.part(index, states), 0
        self._use(ring, index)

    def _use(self, ring: Ring, index: int) -> None:
        """Keep tokens in the slots at `index` of `ring` from now on."""
        slots, apart, sinks = (
            {name: each[index] for name, each in tensors.items()} for tensors in (ring.slots, ring.apart, ring.sinks)
        )
        mark_static(*slots.values(), *apart.values())
        vars(self).update(ring=ring, index=index, slots=slots, apart=apart, sinks=sinks, is_initialized=True)

    @staticmethod
    def _fit(sinks: Tensors, states: Tensors) -> bool:
        """Whether the `sinks` of buffers have the device and dtypes of `states`; not so after a call under autocast."""
        return bool(sinks) and all(
            (sinks[name].device, sinks[name].dtype) == (each.device, each.dtype) for name, each in states.items()
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, plan: UpdatePlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in `plan.length` new tokens, `[batch, kv_heads, length, head_dim]`; return what they attend to.

        Returns:
            Keys and values, `[batch, kv_heads, plan.num_keys, head_dim]`. For one token they are those in the slots, a
            view if these hold them as they are. For several they are the kept tokens and the new ones, behind the
            copies of the sinks if there are some.
        """
        seen = self.take_in({"keys": key_states, "values": value_states}, plan)
        return seen["keys"], seen["values"]

    def take_in(self, states: Tensors, plan: UpdatePlan) -> Tensors:
        """`update`, with keys and values by name."""
        if not self._fit(self.sinks, states):
            self._have_slots_for(states)
        ring = self.ring
        ring.place_sinks(plan.sink_shifts)
        new = ring.encode(states, self.apart, plan)
        if plan.length == 1:
            self._write(states, new, plan, self._undo_of_one(plan))
            kept = {name: each[:, :, : plan.num_keys] for name, each in self.slots.items()}
            return ring.decode(kept, self.apart, plan, "slots")
        columns = "recent" if plan.sees_copies else "slots"
        if plan.sees_copies:
            old = self._gathered(plan.recent_slots(ring.rows.device))
        else:
            old = {name: each[:, :, : max(plan.seen)] for name, each in self.slots.items()}
        evicted = None
        gone = plan.num_recent + plan.length - ring.window.recent
        if plan.sees_copies and gone > 0:  # of the old and the new tokens, the last `recent` stay
            first_new = slice(max(gone - plan.num_recent, 0))
            evicted = {
                name: torch.cat([each[:, :, :gone], new[name][:, :, first_new]], dim=2) for name, each in old.items()
            }
        # What is seen of the old tokens is read, or else gathered, before new ones take their slots.
        old = ring.decode(old, self.apart, plan, columns)
        self._write(states, new, plan, self._recorded(Undo(plan.end, plan.length, evicted)))
        seen = ring.as_seen(states, new, self.apart, plan)
        seen = {name: [old[name], each] for name, each in seen.items()}
        if plan.sees_copies and ring.window.num_sinks > 0:  # whose sinks may be among the new tokens
            copies = self._sink_copies(plan)
            seen = {name: [copies[name], *each] for name, each in seen.items()}
        return {name: torch.cat(each, dim=2) for name, each in seen.items()}

    def _gathered(self, slots: torch.Tensor) -> Tensors:
        """What is in `slots`, int64 `[rows, n]`."""
        return {name: gather_slots(each, slots) for name, each in self.slots.items()}

    def _write(self, states: Tensors, new: Tensors, plan: UpdatePlan, undo: Undo) -> None:
        """Put new tokens into their slots, with `undo` noted before and the columns counted after."""
        self.undo = undo
        self.ring.write(self.slots, new, plan)
        self.ring.write_sinks(self.apart, states, plan)
        self.seen = plan.end

    def write_compiled(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` with one token, in tensors alone: each row's goes into `ring.next_slots`, and all are returned."""
        seen = self.ring.write_compiled(self.slots, self.apart, {"keys": key_states, "values": value_states})
        return seen["keys"], seen["values"]

    def _sink_copies(self, plan: UpdatePlan) -> Tensors:
        """Copies of the sinks, moved for each new column: `[batch, kv_heads, length * num_sinks, head_dim]`."""
        rotation = self.ring.rotation
        copies = {  # [.., length, num_sinks, head_dim]
            name: each[:, :, None].repeat(1, 1, plan.length, 1, 1) for name, each in self.sinks.items()
        }
        if rotation is not None:
            rotating = copies[rotation.tensor]
            rotation.turn_(rotating, rotation.turns(plan.copy_shifts[:, None, :, None], rotating.device))
        return {name: each.flatten(2, 3) for name, each in copies.items()}

    def _undo_of_one(self, plan: UpdatePlan) -> Undo:
        """What takes one new token back; with what it evicts only if several such tokens may be taken back."""
        undo = Undo(plan.end, 1)
        if not self.record_past:
            return undo
        if plan.evicts:
            undo = Undo(plan.end, 1, self._gathered(self.ring.window.slots(plan.tokens(0, self.ring.rows.device))))
        return self._recorded(undo)

    def _recorded(self, undo: Undo) -> Undo:
        """`undo`, behind what was evicted since the last `take_back`; at most as many tokens as are recent."""
        ring = self.ring
        undo, before = replace(undo, offsets=tuple(ring.lowered.offsets)), self.undo
        if not self.record_past or before.columns == 0:
            return undo
        columns = before.columns + undo.columns
        if before.evicted is None or undo.evicted is None:
            latest = undo if before.evicted is None else before
            return replace(latest, end=undo.end, columns=columns)
        most = max(ring.window.recent, undo.evicted["keys"].shape[2])
        before = before.at(ring.lowered.offsets, ring.rotation).evicted
        evicted = {name: torch.cat([before[name], each], 2)[:, :, -most:] for name, each in undo.evicted.items()}
        return replace(undo, columns=min(columns, most), evicted=evicted)

    def take_back(self, end: int, pads: list[int]) -> None:
        """Forget all columns from `end` on, also those that were not all written, and put back what they evicted.

        Args:
            end: the column after the last one that stays. While nothing was evicted it may be any; else at most
                `undo.columns` go.
            pads: `[rows]`, the columns of left padding.
        """
        ring, undo = self.ring, self.undo
        self.seen = end
        columns = undo.end - end
        evicted = undo.evicted
        if evicted is not None:
            window, number, device = ring.window, evicted["keys"].shape[2], ring.rows.device
            first = max(number - columns, 0)
            padding = torch.tensor(pads, dtype=torch.long, device="cpu")[:, None]
            tokens = torch.arange(first - number, 0, dtype=torch.long, device="cpu") - padding
            tokens += undo.end - window.recent
            rows, places = ((tokens >= window.num_sinks) & (tokens < end - padding)).nonzero(as_tuple=True)
            slots = window.slots(tokens[rows, places]).to(device)
            rows = slice(None) if len(pads) == 1 else rows.to(device)
            places = (places + first).to(device)
            for name, each in undo.at(ring.lowered.offsets, ring.rotation).evicted.items():
                self.slots[name][rows, :, slots] = each.to(self.slots[name])[rows, :, places]
            evicted = {name: each[:, :, :first] for name, each in evicted.items()} if first > 0 else None
        # While the past is recorded, what stays now is settled.
        left = 0 if self.record_past else max(undo.columns - columns, 0)
        self.undo = Undo(end, left, evicted, undo.offsets) if left else Undo(end, 0)

    def lower_positions(self, offsets: list[int]) -> None:
        """Lower the positions of the recent keys to `offsets` (`[rows]`) below those that the model gave them."""
        self.ring.lower_positions(offsets)

    def with_rows(self, indices: torch.Tensor, rings: dict[Ring, Ring]) -> "SinkLayer":
        """A copy whose row `i` of the batch is row `indices[i]` here, in its ring among `rings`, of such rows."""
        layer = shared(self)
        layer.ring, layer.undo = rings[self.ring], self.undo.with_rows(indices)
        if layer.is_initialized:
            layer._use(layer.ring, layer.index)
        return layer

    def set_rotations(self, rotation: Optional[Rotation], index_rotation: Optional[Rotation]) -> None:
        """Rotate by these from now on, the keys of an index by the second one."""
        self.ring.rotation = rotation

    def with_sinks(self) -> list["SinkLayer"]:
        """What of this layer is a `SinkLayer`, in the order in which updates come."""
        return [self]

    def progress(self) -> set[int]:
        """The columns after each part of the layer: more than one number if an update was cut short."""
        return {self.seen, self.undo.end}

    def tensors(self) -> Tensors:
        """What a file has of this layer, by name."""
        return self.slots | self.apart

    def memory(self) -> list[torch.Tensor]:
        """The tensors of which it consists, those of its ring, which it shares with others, among them."""
        return [*self.ring.tensors(), *(self.undo.evicted or {}).values()]

    def restore(self, tensors: Tensors, seen: int, offsets: list[int]) -> None:
        """Hold these `tensors` of `seen` columns, in a layer that is new.

        Its sinks are where the model put them, and its recent keys lower by `offsets` (`[rows]`).
        """
        states = {name: tensors.get(f"sink_{name}", tensors[name]) for name in ("keys", "values") if name in tensors}
        self.ring.expect(tensors)
        self._have_slots_for(states)
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        self.seen, self.undo, self.ring.lowered = seen, Undo(seen, 0), Lowered(offsets)

    def get_seq_length(self) -> int:
        """The columns seen."""
        return self.seen

    def get_max_length(self) -> int:
        """The most tokens kept."""
        return self.ring.window.length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, sizes: Union[torch.Tensor, int]) -> tuple[int, int]:
        """How many keys an update without padding returns for so many new tokens, and the column of the first."""
        length = query_length(sizes)
        num_keys = UpdatePlan(self.ring.window, self.seen, length, [0], [0]).num_keys
        return num_keys, self.seen + length - num_keys


class OrderedLayer(SinkLayer):
    """A `SinkLayer` of a model that knows the order of tokens from the columns of its cache (ALiBi, arXiv:2108.12409).

    It returns what is kept in order of the sequence, the sinks first and the new tokens last. So the model's bias over
    columns is one over places in the window. That takes a copy of the window for each update.
    """

    compiles = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, plan: UpdatePlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ever, for a `plan` that sees no copies. Rows with fewer tokens are filled up at the front.

        Returns:
            Keys and values, `[batch, kv_heads, plan.num_keys, head_dim]`; views of the slots where these are in order.
        """
        super().update(key_states, value_states, plan)
        seen = self.numbers(plan)
        return self._in_order(seen["keys"], plan), self._in_order(seen["values"], plan)

    @staticmethod
    def _in_order(buffer: torch.Tensor, plan: UpdatePlan) -> torch.Tensor:
        """The tokens in `buffer`, of all slots, after the update of `plan`."""
        if len(plan.pads) > 1 or plan.needs_mask:
            return gather_slots(buffer, plan.slots_in_order(buffer.device))
        end = plan.seen[0] + plan.num_new[0]
        first, oldest = plan.window.num_sinks, plan.window.slot(end)
        if end <= plan.window.length or oldest == first:
            return buffer[:, :, : plan.num_keys]
        # To join the runs of the ring takes less time than to gather its slots.
        return torch.cat([buffer[:, :, :first], buffer[:, :, oldest:], buffer[:, :, first:oldest]], dim=2)

    def get_mask_sizes(self, sizes: Union[torch.Tensor, int]) -> tuple[int, int]:
        """How many keys an update without padding returns for so many new tokens; the first is column 0."""
        return super().get_mask_sizes(sizes)[0], 0


class IndexedLayer(SinkLayer):
    """A `SinkLayer` of attention that chooses its tokens by an index (DeepSeek sparse attention), whose keys it keeps.

    The index has keys of its own, one head of them, which rotate in their own way. They are in the same slots, as the
    model made them even where those of the attention have 8 bits, because they choose. Where
    tokens score alike, which of them are chosen is by chance, as with any cache.

    Args:
        ring: of `SinkLayer`.
        index_ring: where the keys of the index are kept; it has no values.
    """

    compiles = False
    is_indexed = True

    def __init__(self, ring: Ring, index_ring: Ring):
        super().__init__(ring)
        self.indexer = SinkLayer(index_ring)

    def update_indexer(self, key_states: torch.Tensor, plan: UpdatePlan) -> torch.Tensor:
        """Take in new keys of the index, `[batch, length, index_dim]`; return those to choose among.

        Returns:
            `[batch, plan.num_keys, index_dim]`, in the order of the keys that `update` returns.
        """
        return self.indexer.take_in({"keys": key_states.detach().unsqueeze(1)}, plan)["keys"].squeeze(1)

    def take_back(self, end: int, pads: list[int]) -> None:
        super().take_back(end, pads)
        self.indexer.take_back(end, pads)

    def lower_positions(self, offsets: list[int]) -> None:
        super().lower_positions(offsets)
        self.indexer.lower_positions(offsets)

    def with_rows(self, indices: torch.Tensor, rings: dict[Ring, Ring]) -> "IndexedLayer":
        layer = super().with_rows(indices, rings)
        layer.indexer = self.indexer.with_rows(indices, rings)
        return layer

    def set_rotations(self, rotation: Optional[Rotation], index_rotation: Optional[Rotation]) -> None:
        self.ring.rotation, self.indexer.ring.rotation = rotation, index_rotation

    def with_sinks(self) -> list[SinkLayer]:
        return [self.indexer, self]

    def progress(self) -> set[int]:
        return super().progress() | self.indexer.progress()

    def tensors(self) -> Tensors:
        index = self.indexer.tensors()
        return super().tensors() | ({"indexer_keys": index["keys"]} if index else {})

    def memory(self) -> list[torch.Tensor]:
        return super().memory() + self.indexer.memory()

    def restore(self, tensors: Tensors, seen: int, offsets: list[int]) -> None:
        super().restore(tensors, seen, offsets)
        self.indexer.restore({"keys": tensors["indexer_keys"]}, seen, offsets)


class KeepsStates:
    """What is the same for all layers that keep recurrent states, mixed into transformers' own classes of them."""

    is_croppable = can_record = can_undo = compiles = shows_progress = False
    has_kind = True

    def _keep(self, kind: str, update: Callable, states: torch.Tensor, state_idx: int, kwargs: dict) -> torch.Tensor:
        """Change a state by transformers' `update`. It is made outside of inference mode, and kept without a graph."""
        kept = getattr(self, kind)
        with torch.inference_mode(False) if kept[state_idx] is None else contextlib.nullcontext():
            output = update(states, state_idx, **kwargs)
        if kept[state_idx].requires_grad:
            kept[state_idx] = kept[state_idx].detach()
        return output

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        return self._keep("conv_states", super().update_conv_state, conv_states, state_idx, kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        return self._keep("recurrent_states", super().update_recurrent_state, recurrent_states, state_idx, kwargs)

    def restore(self, tensors: dict[str, torch.Tensor], seen: int, offsets: list[int]) -> None:
        super().restore(tensors, seen, offsets)
        for name, tensor in tensors.items():
            kind, _, state_idx = name.partition(".")
            if kind == "conv_states":
                self.update_conv_state(tensor, int(state_idx))
            elif kind == "recurrent_states":
                self.update_recurrent_state(tensor, int(state_idx))

    def with_rows(self, indices: torch.Tensor, rings: dict[Ring, Ring]) -> Any:
        layer = super().with_rows(indices, rings)
        layer.conv_states, layer.recurrent_states = dict(self.conv_states), dict(self.recurrent_states)
        StateLayer.reorder_cache(layer, indices)
        return layer


class StateAndSinkLayer(KeepsStates, SinkLayer, StateLayer):
    """A layer with full attention and a recurrent state side by side (arXiv:2411.13676). It keeps both.

    Args:
        number_of_states: how many states it has.
        ring: of `SinkLayer`.
    """

    def __init__(self, number_of_states: int, ring: Ring):
        SinkLayer.__init__(self, ring)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, **kwargs) -> None:
        """Allocate for a state; `SinkLayer.update` sees to the keys and values."""
        StateLayer.lazy_initialization(self, **kwargs)

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | states_of(self)

    def memory(self) -> list[torch.Tensor]:
        return super().memory() + list(states_of(self).values())


class UntouchedLayer:
    """A layer that stays transformers' own: it slides, keeps a state, or holds no text.

    This is mixed into its class, and has what a `Stream` asks of a layer: see `SinkLayer` and `untouched`.

    Attributes:
        own: that class.
        rotation: how it rotates its keys; None if it does not.
        offsets: `[rows]`, by how many positions its keys are lower than where the model put them.
        seen, begun: the columns seen, and those after the update that was last begun.
        holds_text: whether it caches something of a text. If not, it is for what comes beside it, as images.
    """

    follows_plan = compiles = is_indexed = False
    shows_progress, record_past = True, False
    _layer_type = None  # transformers would take the class for a kind of layers of its own

    def keep(self, rotation: Optional[Rotation], holds_text: bool, has_kind: bool) -> None:
        """Begin with these attributes, and nothing seen."""
        self.rotation, self.holds_text, self.has_kind = rotation, holds_text, has_kind
        self.seen = self.begun = 0
        self.offsets = [0]

    @property
    def can_undo(self) -> bool:
        """Whether it can take an update back that was cut short: it can if it holds nothing, nor an image."""
        return not self.holds_text and not self._has_keys

    @property
    def can_record(self) -> bool:
        """Whether it can, told to, keep what is needed to take tokens back."""
        return not self.holds_text or "record_past" in vars(self)

    @property
    def counts_columns(self) -> bool:
        """Whether it knows how many columns it has seen."""
        return hasattr(self.own, "get_seq_length")

    def __reduce__(self) -> tuple:
        return _new_untouched, (self.own,), vars(self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ever; it keeps no graph, and tells whether it was cut short."""
        if not self.holds_text:
            return super().update(key_states, value_states, *args, **kwargs)
        if self._has_keys and (self.keys.device, self.keys.dtype) != (key_states.device, key_states.dtype):
            keys, values = self.keys.to(key_states), self.values.to(value_states)
            vars(self).update(keys=keys, values=values, device=key_states.device)
        self.begun = self.seen + key_states.shape[2]
        output = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        self.seen = self.begun
        return output

    def take_back(self, end: int, pads: list[int]) -> None:
        """Forget all columns from `end` on, by transformers' own rules."""
        if self.holds_text:
            self.begun, removed = -1, end - self.seen
            self.crop(removed)
            self.seen = end
            self.begun = end

    def lower_positions(self, offsets: list[int]) -> None:
        """Lower the positions of its keys to `offsets` (`[rows]`) below those that the model gave them."""
        if self.offsets == offsets:
            return
        changed = {"offsets": offsets}
        back = [-distance for distance in distances(self.offsets, offsets)]
        if self.rotation is not None and any(back) and self._has_keys:
            rotating = getattr(self, self.rotation.tensor).clone()
            changed[self.rotation.tensor] = self.rotation.rotate_(rotating, back)
        vars(self).update(changed)

    def with_rows(self, indices: torch.Tensor, rings: dict[Ring, Ring]) -> "UntouchedLayer":
        """A copy whose row `i` of the batch is row `indices[i]` here."""
        layer = shared(self)
        layer.offsets = numbers_of_rows(self.offsets, indices)
        if self._has_keys:
            layer.keys, layer.values = (
                states.index_select(0, indices.to(states.device)) for states in (self.keys, self.values)
            )
        return layer

    def set_rotations(self, rotation: Optional[Rotation], index_rotation: Optional[Rotation]) -> None:
        """Rotate by the first of these from now on."""
        self.rotation = rotation

    def with_sinks(self) -> list[SinkLayer]:
        """What of this layer is a `SinkLayer`: nothing."""
        return []

    def progress(self) -> set[int]:
        """The columns after each part of the layer: more than one number if it was cut short; none if it has none."""
        return {self.seen, self.begun} if self.holds_text and self.counts_columns else set()

    @property
    def _has_keys(self) -> bool:
        return getattr(self, "keys", None) is not None and self.keys.numel() > 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has of this layer, by name."""
        return layer_tensors(self)

    def numbers(self, plan: UpdatePlan) -> dict[str, torch.Tensor]:
        """Its keys and values."""
        return layer_tensors(self)

    def memory(self) -> list[torch.Tensor]:
        """The tensors of which it consists."""
        return list(layer_tensors(self).values())

    def restore(self, tensors: dict[str, torch.Tensor], seen: int, offsets: list[int]) -> None:
        """Hold these `tensors` of `seen` columns, with keys lower by `offsets` (`[rows]`), in a layer that is new."""
        self.offsets = offsets
        if "keys" in tensors:
            self.own.update(self, tensors["keys"], tensors["values"])
            self.cumulative_length = self.seen = self.begun = seen


class UntouchedStates(KeepsStates, UntouchedLayer):
    """The same for a layer that keeps a state, and slides beside that perhaps."""


@functools.cache
def _untouched_class(own: type) -> type:
    """The class of transformers' layers of the class `own` in a stream."""
    mixed_in = UntouchedStates if issubclass(own, StateLayer) else UntouchedLayer
    return type(own.__name__, (mixed_in, own), {"own": own})


def _new_untouched(own: type) -> UntouchedLayer:
    """A layer of that class without attributes, for copies."""
    return object.__new__(_untouched_class(own))


def untouched(layer: Any, rotation: Optional[Rotation], holds_text: bool, has_kind: bool) -> UntouchedLayer:
    """One of a stream, made of a `layer` of transformers before its first token, which stays as it is."""
    kept = _new_untouched(type(layer))
    kept.__dict__.update(copy.deepcopy(layer.__dict__))
    kept.keep(rotation, holds_text, has_kind)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# A model at rest: its configuration, its modules, and whether both are still what they were
# ---------------------------------------------------------------------------------------------------------------------


# The configuration


def trained_length(config: Any) -> Optional[int]:
    """The smallest length that the configuration names, None if it names none.

    Below it no model changes its frequencies, or scales its queries.
    """
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "original_max_position_embeddings", "max_seq_len")
    named = [getattr(config, name, None) for name in (*names, "floor_scale")]  # the last is where queries are scaled
    named += [settings.get("original_max_position_embeddings") for settings in rope_parameters(config)]
    return min((int(length) for length in named if length), default=None)


def unscaled_length(config: Any) -> Optional[int]:
    """How many tokens the model takes before it scales queries by their place; None if no setting says that it does."""
    config = config.get_text_config(decoder=True)
    named = [config.floor_scale - 1] if getattr(config, "attn_temperature_tuning", False) else []
    for settings in rope_parameters(config):
        if settings.get("llama_4_scaling_beta"):
            named.append(settings["original_max_position_embeddings"])
    return min(named, default=None)


def rope_parameters(config: Any) -> list[dict]:
    """The model's RoPE settings: one dict, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer; empty if the configuration does not name them."""
    return list(getattr(config.get_text_config(decoder=True), "layer_types", None) or [])


def slides_everywhere(model: PreTrainedModel) -> bool:
    """Whether all layers attend to their own `sliding_window` latest tokens only.

    A cache no longer than that determines what they see.
    """
    config, kinds = model.config.get_text_config(decoder=True), set(layer_kinds(model.config))
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return slides and kinds <= {"sliding_attention"}


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes a mask over keys. Flash attention doesn't."""
    return "flash" not in str(model.config.get_text_config(decoder=True)._attn_implementation)


def brings_code(model: PreTrainedModel) -> bool:
    """Whether the model's forward comes with the model. Such code may ask a cache what transformers' own does not."""
    forward_of = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    return not forward_of.__module__.startswith("transformers.")


# The modules


def modules_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """`model` and all modules in it, as `model.modules()` in a fifth of the time."""
    modules, found = [model], {model}
    for module in modules:
        for child in module._modules.values():
            if child is not None and child not in found:
                found.add(child)
                modules.append(child)
    return modules


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model gets its tokens: on the CPU if accelerate keeps its weights elsewhere until they are needed."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _frequencies(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What may be rotary frequencies in a module, its children left out: `[pairs]`, float64 on the CPU.

    Each vector that is no weight may be. So may the angles of position 1 in a table of sines and cosines, which is
    `[positions, 2 * pairs]`.
    """
    for tensor in [*module._buffers.values(), *vars(module).values()]:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dim() == 1:
            yield tensor.detach().to("cpu", torch.float64)
        elif tensor.dim() == 2 and min(tensor.shape) > 1 and tensor.shape[1] % 2 == 0:
            first, second = tensor[1].detach().to("cpu", torch.float64).chunk(2)
            if torch.allclose(first**2 + second**2, torch.ones_like(first), atol=1e-2):
                yield from (torch.atan2(first, second), torch.atan2(second, first))


# Whether they are still what they were


@torch.inference_mode()
def some_numbers(modules: list[torch.nn.Module]) -> bytes:
    """The bytes of 16 numbers of each weight and buffer. They show most changes that torch does not count (`.data`)."""
    numbers: dict[tuple, list[torch.Tensor]] = {}
    tensors = [(*module._parameters.values(), *module._buffers.values()) for module in modules]
    for tensor in itertools.chain.from_iterable(tensors):
        # Left out: what is no plain tensor, and what accelerate keeps elsewhere until it is needed ("meta").
        is_plain = type(tensor) is torch.nn.Parameter or (tensor is not None and type(tensor.data) is torch.Tensor)
        length = 0 if not is_plain or tensor.is_meta else tensor.numel()
        if length == 0:
            continue
        count = min(length, 16)
        if tensor.is_contiguous():  # at once, without the views between
            some = tensor.as_strided((count,), (length // count,))
        else:
            some = tensor.reshape(-1)[:: length // count]
        numbers.setdefault((tensor.dtype, tensor.device), []).append(some)
    return b"".join(torch.cat(each).cpu().view(torch.uint8).numpy().tobytes() for each in numbers.values())


class Stamp:
    """What the traits of a model depend on, as it can be seen without running the model. It keeps nothing alive.

    That is: which modules and weights it has; dtype, shape, device and version of each weight; the code and the plain
    settings of the modules (training and active adapters among them); the configuration; and what may be frequencies.
    A weight changed behind torch's back (`.data`) is not seen. No rotation depends on one. Each call of `generate`
    compares it, so that is quick: a millisecond for 1,000 modules.

    Args:
        counters: for each module, the names of settings that are ignored; None if there are none.

    Attributes:
        has_run: whether a call of `generate` has run the model since.
        numbers: see `some_numbers`. `fits` does not compare them, because that waits for the device.
    """

    def __init__(self, model: PreTrainedModel, counters: Optional[list[set[str]]] = None):
        modules = modules_of(model)
        self.has_run = False
        self.counters = counters if counters and len(counters) == len(modules) else [set() for _ in modules]
        self.numbers = some_numbers(modules)
        self._references, self._values = _identities(model, modules)
        self._angles = list(map(_angles, modules))
        self._settings = list(map(_settings, modules, self.counters))
        self._have_settings = list(map(_comparison, modules, self.counters, self._settings))

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether `model` is still as it was when the stamp was made."""
        modules = modules_of(model)
        references, values = _identities(model, modules)
        if len(references) != len(self._references) or not all(map(operator.is_, references, self._references)):
            return False
        unclear = [number for number, module in enumerate(modules) if not self._have_settings[number](vars(module))]
        return values == self._values and all(
            _settings(modules[number], self.counters[number]) == self._settings[number]
            and _angles(modules[number]) == self._angles[number]
            for number in unclear
        )

    def leave_out_counters(self, model: PreTrainedModel) -> None:
        """Ignore from now on the numbers that changed or came while `model` ran: the user did not set them."""
        for number, (module, counters, then) in enumerate(zip(modules_of(model), self.counters, self._settings)):
            for name, now in _settings(module, counters).items():
                are_numbers = _is_plain(now, (int, float)) and _is_plain(then.get(name, 0), (int, float))
                if are_numbers and then.get(name) != now:
                    counters.add(name)
            self._settings[number] = {name: value for name, value in then.items() if name not in counters}
            self._have_settings[number] = _comparison(module, counters, self._settings[number])


def _identities(model: PreTrainedModel, modules: list[torch.nn.Module]) -> tuple[list, list]:
    """Weak references to what must be the same objects; and, of what must be equal, the values."""
    classes = list(map(type, modules))
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    references = list(map(weakref.ref, itertools.chain(modules, classes)))
    # A weight that accelerate keeps elsewhere is another object each time it is needed.
    references += [weakref.ref(weight) for weight in weights if not weight.is_meta]
    values: list = [(each.dtype, each.shape, each.device, each.is_inference() or each._version) for each in weights]
    patched = [(module, vars(module)["forward"]) for module in modules if "forward" in vars(module)]
    # 4.54 to 4.57 set a forward while they collect hidden states. Afterwards it is the method of the class again.
    values += [known_by(forward) for module, forward in patched if forward != type(module).forward.__get__(module)]
    values += [known_by(getattr(cls, "forward", None)) for cls in dict.fromkeys(classes)]
    config, inner = model.config, model.config.get_text_config(decoder=True)
    values += [repr(config.to_dict()), config._attn_implementation, inner._attn_implementation]
    return references, values


class _Same(weakref.ref):
    """A reference that equals another one only while both are to the same object."""

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self() is not None and self() is other()


def known_by(value: Any) -> Any:
    """A key for `value`. Those of two values are equal only if both are one object, or alike and of the same objects.

    So a method, or a function with some of its arguments, keeps its key when it is made again. No key keeps an object
    alive.
    """
    if type(value) in (type(None), bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return tuple(map(known_by, value))
    if type(value) is dict:
        return tuple(map(known_by, value.items()))
    if type(value) is functools.partial:
        return known_by((value.func, value.args, value.keywords))
    if inspect.ismethod(value):
        return known_by((value.__self__, value.__func__))
    try:
        return _Same(value)
    except TypeError:
        return object()  # it allows no weak reference, so its key equals no other


def known_hooks(before: dict[int, Callable], after: dict[int, Callable]) -> list[tuple]:
    """For each hook before and after a forward, whether it comes after, and its key by `known_by`.

    transformers' own hooks are left out, because they change nothing.
    """
    hooks = [(False, hook) for hook in before.values()] + [(True, hook) for hook in after.values()]
    return [(is_after, known_by(hook)) for is_after, hook in hooks if not origin(hook).startswith("transformers.")]


def origin(hook: Callable) -> str:
    """The name of the module that the code of a hook comes with."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None))


# These attributes are no settings: torch has them on each module, or transformers leaves them after hidden states.
NO_SETTINGS = {*vars(torch.nn.Module()), "_output_capturing_hooks_installed"} - {"training"}


def _settings(module: torch.nn.Module, left_out: set[str]) -> dict[str, Any]:
    """Copies of the plain settings of `module`, its children left out."""
    return {
        name: copy.deepcopy(value)
        for name, value in vars(module).items()
        if name not in NO_SETTINGS and name not in left_out and _is_plain(value)
    }


def _angles(module: torch.nn.Module) -> list:
    """What may be frequencies in `module`, as numbers, and the hooks that may change what it makes of them."""
    frequencies = [frequencies.tolist() for frequencies in _frequencies(module)]
    hooks = known_hooks(module._forward_pre_hooks, module._forward_hooks) if frequencies else []
    return frequencies + hooks


def _comparison(module: torch.nn.Module, left_out: set[str], settings: dict[str, Any]) -> Callable[[dict], bool]:
    """A quick test whether `vars(module)` still have these settings, and no tensor beside the weights.

    It also says no where only a slower comparison can tell.
    """
    length, no_settings = len(vars(module)), NO_SETTINGS | left_out
    names = [name for name in vars(module) if name not in no_settings]
    values = operator.itemgetter(*names) if names else len
    expected = values({name: settings.get(name, _NO_SETTING) for name in names})

    def has_settings(attributes: dict[str, Any]) -> bool:
        try:
            same = len(attributes) == length and expected == values(attributes)
            return bool(same) and not attributes["_buffers"]
        except (KeyError, RuntimeError, ValueError):  # a setting is gone, or has become an array
            return False

    return has_settings


class _NoSetting:
    """Equal to any value that is neither a setting nor a tensor. (Tensors may be frequencies.)"""

    def __eq__(self, value: Any) -> bool:
        # Not by `isinstance`, which looks up `__class__` by the code of a configuration, thrice as slow.
        return not _is_plain(value) and not issubclass(type(value), torch.Tensor)


_NO_SETTING = _NoSetting()


def _is_plain(value: Any, types: Sequence[type] = (bool, int, float, str)) -> bool:
    """Whether a value is a setting that can be compared: of one of these types, or a list or dict of such values."""
    if type(value) in (dict, list, tuple):
        values = value.values() if type(value) is dict else value
        return len(value) > 0 and all(_is_plain(each, types) for each in values)
    return type(value) in types


# ---------------------------------------------------------------------------------------------------------------------
# Standing in for a model: what runs in its place
# ---------------------------------------------------------------------------------------------------------------------


def path_to_decoder(model: PreTrainedModel) -> list[str]:
    """The names of the modules that lead to the model's decoder, which holds its embeddings, and of that; or none."""
    embeddings = model.get_input_embeddings()
    return next((name.split(".") for name, module in model.named_modules() if module is embeddings), [])[:-1]


def shared_path(model: PreTrainedModel, decoder: Any = None) -> Any:
    """A stand-in for `model`, and for the modules around its decoder: what runs set on them does not reach the model.

    A model whose positions have several axes keeps in `rope_deltas` by how much those of its latest prompt differ from
    the count of tokens. That prompt may be another conversation's. In a stream, and while a model is read, they don't
    differ.

    Args:
        decoder: what runs in the place of the model's, if given. What is around it then runs uncompiled, and so do the
            forwards that others put there, as accelerate does: these and compiled code would run the model's own.
    """
    modules = [model]
    for name in path_to_decoder(model):
        modules.append(modules[-1]._modules[name])
    *around, inner = modules
    stand_ins = {id(module): shared(module) for module in around or modules}
    if decoder is not None and around:
        stand_ins[id(inner)] = decoder
    for module in around:
        if decoder is not None:
            _uncompile(module, stand_ins)
        else:
            below = {name: stand_ins.get(id(child), child) for name, child in module._modules.items()}
            vars(stand_ins[id(module)])["_modules"] = below
    _count_tokens_alone(stand_ins.values(), input_device(model))
    return stand_ins[id(model)]


def calling(module: torch.nn.Module, call: Callable) -> Any:
    """A stand-in for a module that runs `call` with the arguments of its forward, by name, and no hooks."""
    names, stand_in = list(inspect.signature(module.forward).parameters), shared(module)
    # `Module.__call__` calls this instead of the hooks and the forward.
    vars(stand_in)["_compiled_call_impl"] = lambda *args, **kwargs: call(**dict(zip(names, args)), **kwargs)
    return stand_in


def _count_tokens_alone(stand_ins: Iterable[Any], device: torch.device) -> None:
    """Have stand-ins of modules make positions that are the count of tokens."""
    for stand_in in stand_ins:
        if "rope_deltas" in vars(stand_in):
            vars(stand_in)["rope_deltas"] = torch.zeros(1, 1, dtype=torch.long, device=device)


def uncompiled_code(model: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a model that run it uncompiled; none if the user did not compile it as a whole."""
    uncompiled = {}
    if vars(model).get("_compiled_call_impl") is not None:  # by `model.compile()`
        uncompiled["_compiled_call_impl"] = None
    forward = getattr(vars(model).get("forward"), "_torchdynamo_orig_callable", None)
    if forward is not None:  # by `model.forward = torch.compile(model.forward)`
        uncompiled["forward"] = forward
    return uncompiled


# A model needs the hooks of these to work: they gather its weights, or move them and what it computes.
NEEDED_HOOKS = ("torch.distributed.", "torch.nn.", "transformers.", "accelerate.", "deepspeed.", "peft.")
NEEDED_HOOKS += ("transformers_modules.",)  # code that comes with a model

# Modules are looked for in this many wrappers of a forward. A function that is in its own closure has no end of them.
MOST_WRAPPERS = 8


@contextlib.contextmanager
def without_hooks(model: PreTrainedModel) -> Iterator[Any]:
    """A stand-in that runs as `model` does, but uncompiled and without the hooks that users and their tools put on it.

    Such hooks are for the user's texts: they count, keep or change what they see. The model stays as it is, as other
    threads may run it. Instead each of its modules gets a stand-in, which calls the stand-ins of others. They share the
    weights. What a module sets on itself as it runs, its hooks and its buffers, each stand-in has for itself.
    """
    modules = [module for module in model.modules() if not hasattr(module, "_orig_mod")]
    stand_ins = {id(module): shared(module) for module in modules}
    for module in modules:
        _uncompile(module, stand_ins)
        _part_from(module, stand_ins)
    _count_tokens_alone(stand_ins.values(), input_device(model))
    try:
        yield stand_ins[id(model)]
    finally:
        for stand_in in stand_ins.values():
            vars(stand_in).clear()  # they hold each other, and the weights


def _uncompile(module: torch.nn.Module, stand_ins: dict[int, Any]) -> None:
    """Have the stand-in of `module` run uncompiled, and call other stand-ins. Compiling takes longer than a few tokens.

    Args:
        stand_ins: of modules around and in it too, by the `id` of each. Wrappers of compiled code have none.
    """
    own = vars(stand_ins[id(module)])
    own.update(uncompiled_code(module))
    own.update({name: _rebound(value, stand_ins) for name, value in own.items()})
    own["_modules"] = {name: _rebound(child, stand_ins) for name, child in module._modules.items()}


def _part_from(module: torch.nn.Module, stand_ins: dict[int, Any]) -> None:
    """Give the stand-in of `module` what its run changes, and of its hooks those alone that the model needs."""
    stand_in = stand_ins[id(module)]
    own = vars(stand_in)
    if hasattr(type(own.get("forward")), "__deepcopy__"):  # a tool has put an object in its place
        own["forward"] = copy.deepcopy(own["forward"], dict(stand_ins))
    for name in ("_buffers", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
        own[name] = copy.copy(own[name])
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        needed = {key: hook for key, hook in list(own[name].items()) if _is_needed(hook, module, stand_ins)}
        # They are called with their own module: some look up what they know of it.
        own[name] = OrderedDict((key, lambda _, *args, hook=hook: hook(module, *args)) for key, hook in needed.items())
    # `Module.__call__` calls this instead of the hooks, among which are those of all modules of the process.
    own["_compiled_call_impl"] = functools.partial(_call_with_own_hooks, stand_in)


def _is_needed(hook: Callable, module: torch.nn.Module, stand_ins: dict[int, Any]) -> bool:
    """Whether a model does not work as it should without a `hook` on its `module`."""
    if id(getattr(hook, "__self__", None)) in stand_ins:  # a method of one of its modules
        return True
    if origin(hook).startswith(NEEDED_HOOKS) and not is_of_rows(hook):
        return True
    # Users change how keys rotate by a hook on the module that makes the angles.
    return any(
        frequencies.any() and (frequencies >= 0).all() and (frequencies.diff() <= 0).all()
        for frequencies in _frequencies(module)
    )


def is_of_rows(hook: Callable) -> bool:
    """Whether a hook is one that peft puts on for a single call, about the rows of its batch (`adapter_names`)."""
    return isinstance(hook, functools.partial) and origin(hook).startswith("peft.")


@contextlib.contextmanager
def adapters_of_rows(model: Any) -> Iterator[None]:
    """After an error in the block, take peft's hooks for the rows of a batch off: it does so only where none comes."""
    try:
        yield
    except BaseException:
        for module in model.modules() if isinstance(model, torch.nn.Module) else []:
            for key, hook in list(module._forward_pre_hooks.items()):
                if is_of_rows(hook):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def _call_with_own_hooks(stand_in: Any, *args: Any, **kwargs: Any) -> Any:
    """`Module.__call__` with the forward hooks of the stand-in alone."""
    for key, hook in stand_in._forward_pre_hooks.items():
        if key in stand_in._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(stand_in, args, kwargs) or (args, kwargs)
        else:
            changed = hook(stand_in, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    output = stand_in.forward(*args, **kwargs)
    for key, hook in stand_in._forward_hooks.items():
        inputs = (args, kwargs) if key in stand_in._forward_hooks_with_kwargs else (args,)
        changed = hook(stand_in, *inputs, output)
        output = output if changed is None else changed
    return output


def _rebound(value: Any, stand_ins: dict[int, Any], depth: int = 0) -> Any:
    """`value`, with each module in it exchanged for its stand-in: in methods, partial functions and closures."""
    if isinstance(value, torch.nn.Module):
        return stand_ins.get(id(value._modules.get("_orig_mod", value)), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, stand_ins))
    if depth == MOST_WRAPPERS:
        return value
    if isinstance(value, functools.partial):
        args = [_rebound(each, stand_ins, depth + 1) for each in (value.func, *value.args)]
        rebound = functools.partial(*args, **value.keywords)
    elif isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(_rebound_cell(cell, stand_ins, depth + 1) for cell in value.__closure__)
        if all(map(operator.is_, cells, value.__closure__)):
            return value
        rebound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        rebound.__kwdefaults__ = value.__kwdefaults__
    else:
        return value
    return functools.update_wrapper(rebound, value)  # it has the signature


def _rebound_cell(cell: CellType, stand_ins: dict[int, Any], depth: int) -> CellType:
    """A cell of a closure for `_rebound`: the same one unless that changes what is in it."""
    try:
        value = cell.cell_contents
    except ValueError:  # it is empty
        return cell
    rebound = _rebound(value, stand_ins, depth)
    return cell if rebound is value else CellType(rebound)


# ---------------------------------------------------------------------------------------------------------------------
# Models that can't be streamed
# ---------------------------------------------------------------------------------------------------------------------

# Errors that may come from a model, or from what a file holds for it.
MODEL_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
MODEL_ERRORS += (safetensors.SafetensorError, StopIteration)

# Those that come from the machine: its memory, its devices, its other processes. Not every torch has all.
_classes = [(torch, "OutOfMemoryError"), (torch, "AcceleratorError"), (torch.distributed, "DistError")]
MACHINE_ERRORS = tuple(vars(module)[name] for module, name in _classes if name in vars(module))
# Words in errors of the machine that have no class of their own.
MACHINE_WORDS = ("DefaultCPUAllocator", "out of memory", "CUDA error", "gloo/")


@contextlib.contextmanager
def telling(tell: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raise `tell(error)` instead of an `error` of the block that comes from a model or from what a file holds.

    Others pass as they are: lack of memory, lost devices and processes, time limits, files that can't be read.
    """
    try:
        yield
    except MODEL_ERRORS as error:
        if is_of_machine(error):
            raise
        raise tell(error) from error


def is_of_machine(error: Exception) -> bool:
    """Whether an error is one of the machine, and tells nothing of a model."""
    return isinstance(error, MACHINE_ERRORS) or any(word in str(error) for word in MACHINE_WORDS)


def cant_stream(model: PreTrainedModel, reason: str, limit: str = "") -> ValueError:
    """The error for a model that can't be streamed, and the `reason`. A `limit` that would avoid it comes first."""
    return ValueError(f"{limit}`model` ({type(model).__name__}) can't be streamed: {reason}")


def unwrapped(model: Any, name: str = "model") -> PreTrainedModel:
    """The model of transformers in the argument `name`, without a wrapper of `torch.compile` or peft.

    It raises TypeError if there is none, or it does not generate; and ValueError if an adapter can't be streamed.
    """
    inner = getattr(model, "_orig_mod", model)
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, transformers.GenerationMixin):
        raise TypeError(
            f"`{name}` must be a transformers `PreTrainedModel` that generates, got {type(inner).__name__}. Load a "
            "model with its language modeling head."
        )
    # While such a peft model generates, the model inside prepares its inputs by a method of the wrapper.
    for wrapper in (model, getattr(inner.prepare_inputs_for_generation, "__self__", None)):
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise cant_stream(
                wrapper,
                "its adapter puts what it learned before the prompt, where a stream counts no tokens. Use another kind "
                "of adapter, as LoRA.",
            )
    _refuse_adapters(inner)
    return inner


def _refuse_adapters(model: PreTrainedModel) -> None:
    """Raise if an active adapter of peft looks at more than the tokens of one forward pass."""
    reasons = {
        "SHADOW": "peft runs a model of its own beside it, which looks at all tokens in a cache that is no stream",
        "XLORA": "peft runs the model twice in each forward pass, with one cache",
    }
    configs = getattr(model, "peft_config", None)
    for name, config in (configs if isinstance(configs, dict) else {}).items():
        kind, active = getattr(config, "peft_type", None), set()
        reason = reasons.get(kind)
        if getattr(config, "alora_invocation_tokens", None):
            reason = (
                "peft switches it on from a token of the prompt on, which it counts back from the end of what comes at "
                "once (`alora_invocation_tokens`), and a long prompt comes in parts"
            )
        for module in modules_of(model) if reason is not None else ():
            names = getattr(module, "active_adapters", None)
            if isinstance(names, list) and not module.disable_adapters:
                active.update(names)
            for hook in module._forward_pre_hooks.values():  # an adapter for each row
                active.update(getattr(hook, "keywords", {}).get("adapter_names") or ())
        # An X-LoRA stands in no layer: it mixes those that do.
        if name in active or (active and kind == "XLORA"):
            raise cant_stream(model, f"of its adapter {name!r}, {reason}. Use another kind of adapter, as LoRA.")


def refuse_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that can't be streamed, whatever the window."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` ({name}) is an encoder-decoder, and only a decoder-only model can be streamed.")
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in modules_of(model)):
        raise ValueError(
            f"`model` ({name}) can't be streamed while it trains with gradient checkpointing, as that leaves any cache "
            "empty: call `model.eval()` first."
        )
    if not model._supports_default_dynamic_cache():
        raise cant_stream(
            model,
            f"transformers {transformers.__version__} gives it a cache of its own, which a `SinkCache` can't stand in "
            "for. Use a model with full attention in its layers.",
        )
    _refuse_layers(model)


def _refuse_layers(model: PreTrainedModel) -> None:
    """Raise unless some layers of the model have full attention, and the others can stay as they are."""
    config = model.config.get_text_config(decoder=True)
    kinds, hybrid = set(layer_kinds(config)), getattr(config, HYBRID_MARKER, None)
    if slides_everywhere(model) and not hybrid:
        return
    failed = f"transformers {transformers.__version__} can't make a cache for it"
    with telling(lambda error: cant_stream(model, f"{failed}: {error}")):
        own = default_layers(model)
    classes = layer_classes(own)
    unknown = ", ".join(sorted(classes - {*FULL_LAYERS, *UNTOUCHED_LAYERS}))
    if hybrid or (CACHED_KINDS is not None and kinds - CACHED_KINDS):
        named = ", ".join(sorted(kinds)) or "full and sliding attention"
        reason = f"transformers {transformers.__version__} can't cache its kinds of layers ({named}) each in its way"
    elif unknown:
        reason = f"its layers cache more than keys and values ({unknown})"
    elif own and not classes & set(FULL_LAYERS):
        reason = "none of its layers attends to all tokens, so it takes constant memory without a `SinkCache`"
    elif getattr(config, "n_recurrent_loops", 1) > 1:
        reason = "it runs layers in loops, and adds some to the cache for these or reads keys out of it by itself"
    elif own and len(own) < config.num_hidden_layers:
        reason = f"its last {config.num_hidden_layers - len(own)} layers read the keys of others out of the cache"
    else:
        return
    raise cant_stream(model, f"{reason}. Use a model with full attention in its layers.")


def refuse_window(model: PreTrainedModel, window: Window) -> None:
    """Raise ValueError for a window that is too long for a model."""
    config = model.config.get_text_config(decoder=True)
    changing = {settings.get("rope_type", settings.get("type")) for settings in rope_parameters(config)}
    limits = [
        (
            config.sliding_window if slides_everywhere(model) else None,
            "the model's own attention reaches no further back, so the sinks would be out of its sight.",
        ),
        (
            getattr(config, "keep_window_size", None),
            "of more tokens the model's attention chooses some, which depends on their order in the cache "
            "(`keep_window_size`).",
        ),
        (
            unscaled_length(config),
            "past that the model scales its queries by their place, and tokens of one update would be scaled otherwise "
            "than one by one.",
        ),
        (
            trained_length(config) if changing & {"dynamic", "longrope"} else None,
            "past that the model changes the frequencies of its rotary embeddings, and the keys in the cache would no "
            "longer fit.",
        ),
    ]
    for longest, reason in limits:
        if longest is not None and window.length > longest:
            raise ValueError(f"`window_length` must be at most {longest}, got {window.length}: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a model: how it rotates its keys, and what else a stream has to know
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModelTraits:
    """What was found out about a model by running it on a few tokens.

    Args:
        rotations: for each layer, how it rotates its keys, and those of the index by which it chooses tokens; None
            for keys without a position, or without an index.
        own_layers: transformers' own layers of the model, before their first token. Empty if it knows no kinds of them,
            or if all slide alike.
        layouts: for each layer, the shape, dtype and device of each tensor that it caches of text, equal in equal
            layers; empty if it caches nothing of text.
        fingerprint: what the model is known by, its last keys for some tokens: float32 `[4, kv_heads, 1, head_dim]`.
        continues_states: whether several tokens at once go on from a layer's state, as single ones do.
        continues_positions: whether the model counts its positions on if it is given none.
        rounding: the relative rounding of what its attention gets.
        reach: up to which position all this was tried, or with how many columns.
        mask_dtype: of the masks that its attention takes.
        trained_length, brings_code: see the functions of these names.
        cache_name: the argument of its forward that takes a cache.
        ordered: whether the model knows the order of tokens by the columns of its cache, and is given no positions.
        counts_places: whether the model, where it counts the tokens before, is given `UpdatePlan.place`.
        balances_experts: whether it always returns the logits of its routers, and a loss made of them.
        inverts_masks: whether in a mask of four dimensions it takes 1 for what is seen and 0 for what is not.
        rotates_by_axes: whether the same rotations move tokens that have another position on each axis, as of images.
        factors: for each layer, by what the numbers of channels that stand out are divided where they are kept in 8
            bits: float32 `[kv_heads, head_dim]` by the names "keys" and "values", if there are such channels. None
            before `read_factors`.
    """

    rotations: list[tuple[Optional[Rotation], Optional[Rotation]]]
    own_layers: list
    layouts: list[tuple]
    fingerprint: torch.Tensor
    continues_states: bool
    continues_positions: bool
    rounding: float
    reach: int
    mask_dtype: torch.dtype
    trained_length: Optional[int]
    cache_name: str
    ordered: bool
    counts_places: bool
    balances_experts: bool
    brings_code: bool
    inverts_masks: bool
    rotates_by_axes: bool
    factors: Optional[list[dict[str, torch.Tensor]]] = None

    def __deepcopy__(self, memo: dict) -> "ModelTraits":
        return self  # they never change


# At first a model is tried with this many columns in its cache, where it goes by them.
SOME_COLUMNS = 16

# The traits of each model, and the stamp of what they depend on.
_readings: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[Stamp, ModelTraits]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def read_model(model: PreTrainedModel) -> ModelTraits:
    """Find how `model` knows the order of tokens, and what else a stream has to know, by running it on a few tokens.

    The traits are remembered for as long as the model lives and what they depend on stays the same.

    Raises:
        ValueError: it can't be streamed.
    """
    stamp, traits = _readings.get(model, (None, None))
    if traits is None or not stamp.fits(model):
        refuse_model(model)
        if not hasattr(model.get_input_embeddings(), "weight"):
            raise cant_stream(
                model, "it has more than one table of embeddings, as where a token is several codes of a sound."
            )
        before = Stamp(model)
        with without_hooks(model) as stand_in:
            traits = _read_anew(stand_in)
        before.leave_out_counters(model)
        _readings[model] = Stamp(model, before.counters), traits
    return traits


def after_a_call(model: PreTrainedModel) -> None:
    """After a first call: ignore from now on what it changed on `model`. Hooks may count, and none ran before it."""
    stamp, _ = _readings.get(model, (None, None))
    if stamp is not None and not stamp.has_run:
        stamp.has_run = True
        stamp.leave_out_counters(model)


def _remember(model: PreTrainedModel, traits: ModelTraits) -> None:
    """Remember `traits`, of which more was found by running `model`."""
    before, _ = _readings[model]
    stamp = Stamp(model, before.counters)
    stamp.numbers = before.numbers  # of when its fingerprint was read
    _readings[model] = stamp, traits


def _read_anew(model: PreTrainedModel) -> ModelTraits:
    """`read_model` of a model `without_hooks`, whatever was read of it before."""
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" in parameters:
        return _read_rotations(model) or _read_order(model, "no layer rotates its keys with their position")
    try:
        return _read_order(model, "its forward takes no `position_ids`, or makes nothing of them")
    except ValueError:
        # A wrapped forward may hand on whatever it gets, positions too.
        hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        traits = _read_rotations(model) if hands_on else None
        if traits is None:
            raise
        return traits


def _read_rotations(model: PreTrainedModel) -> Optional[ModelTraits]:
    """The traits of a model that takes positions; None if no key rotates, and order may show by columns.

    The model is run on single tokens, at position 0 and again `distance` positions later. A token alone attends to
    itself, whatever its position. So with relative positions the runs differ in the rotation of the keys and in nothing
    else. Each layer gets the rotation, among those that the model's own tensors suggest, that takes the first run's
    keys to the second's. More runs of a few tokens tell whether all that the model does is relative.
    """
    # Far enough that scaled frequencies, which differ in the slow pairs only, are told apart.
    distance = min(trained_length(model.config) or 1024, 1024) - 1
    before, after, rounding, logits, changed, allowed = _compare_at(model, distance)
    tolerance = _tolerance(distance, rounding)
    fits = _fit_rotations(model, before, after, distance)
    for layer_idx, (left, found) in enumerate(fits):
        if {"keys", "values"} <= found.keys() or left > tolerance:
            raise _unreadable(
                model,
                f"the keys of its layer {layer_idx} change with their position, but not by a rotation, so they can't "
                f"be moved as tokens are evicted. From position 0 to {distance} the nearest rotation, of frequencies "
                f"that stand in the model, leaves {left:.2g} of their length unexplained (rounding: {tolerance:.2g}).",
            )
    rotations = [(found.get("keys", found.get("values")), found.get("indexer_keys")) for _, found in fits]
    if not any(map(any, rotations)) and not (
        any(before) and _keeps_states(model) and _ignores_cache_order(model, rounding)
    ):
        return None
    _refuse_change(model, distance, changed, allowed)
    _refuse_mixing(model, logits, max(allowed, 1e-5))
    for layer_idx, layer in enumerate(before):
        if "indexer_keys" in layer and rotations[layer_idx][1] is None:
            raise _unreadable(
                model,
                f"the index by which its layer {layer_idx} chooses tokens keeps keys without positions, and takes "
                "these from the columns of the cache.",
            )
    return _traits(model, rotations, before, rounding, distance, ordered=False)


def _read_order(model: PreTrainedModel, reason: str) -> ModelTraits:
    """The traits of a model that knows the order of tokens by the columns of its cache, or does not know it.

    As tokens leave the window, the others come to stand in other columns. So what is cached of a token must not tell in
    which column it came. And rows with fewer tokens are filled up with padding, which may change nothing. For other
    models it raises ValueError; `reason` is why their positions don't serve either.
    """

    def refusal(error: Exception) -> ValueError:
        seen = error if type(error) is ValueError else f"it failed on a few tokens ({error!r})"
        return _unreadable(
            model,
            f"{reason}. Nor does it go by the columns of its cache, as with ALiBi: {seen}. Use a model with rotary "
            "position embeddings (RoPE) or ALiBi.",
        )

    with telling(refusal):
        if _keeps_states(model) or layer_classes(default_layers(model)) & {*UNTOUCHED_LAYERS}:
            raise ValueError("some of its layers slide or keep a state, and know no columns")
        cached, rounding = _read_columns(model, SOME_COLUMNS)
        _refuse_seen_padding(model, rounding)
    return _traits(model, [(None, None)] * len(cached), cached, rounding, SOME_COLUMNS, ordered=True)


def _traits(
    model: PreTrainedModel, rotations: list[tuple], cached: list[dict], rounding: float, reach: int, ordered: bool
) -> ModelTraits:
    """The traits of `model` with these, and those that follow from what it `cached` of single tokens."""
    layouts = [tuple((states.shape, states.dtype, states.device) for states in layer.values()) for layer in cached]
    # Queries may be wider than the first parameter, whose dtype is the model's. Narrower ones take a wider mask.
    dtypes = (dtype for layer in layouts for _, dtype, _ in layer)
    mask_dtype = functools.reduce(torch.promote_types, dtypes, model.dtype)
    return ModelTraits(
        rotations=rotations,
        own_layers=[] if slides_everywhere(model) else default_layers(model),
        layouts=layouts,
        fingerprint=_fingerprint(cached),
        continues_states=_continues_states(model, rounding),
        continues_positions=_continues_positions(model, rounding),
        rounding=rounding,
        reach=reach,
        mask_dtype=mask_dtype,
        trained_length=trained_length(model.config),
        cache_name=cache_name(model.forward),
        ordered=ordered,
        counts_places=ordered or COUNTS_BY_LAYER or brings_code(model) or unscaled_length(model.config) is not None,
        balances_experts=bool(getattr(model.config.get_text_config(decoder=True), "output_router_logits", False)),
        brings_code=brings_code(model),
        inverts_masks=not ordered and brings_code(model) and _inverts_masks(model, mask_dtype, rounding),
        rotates_by_axes=_rotates_by_axes(model, rotations, rounding),
    )


@torch.no_grad()
def read_further(model: PreTrainedModel, traits: ModelTraits, window_length: int, reach: int) -> None:
    """Raise ValueError unless `traits` hold up to position `reach` too, and remember that they do."""
    reach = window_length if traits.ordered else reach
    if reach <= traits.reach:
        return
    named = traits.trained_length is not None and traits.trained_length < window_length
    limit = f"`window_length` must be at most {traits.trained_length}, got {window_length}. " if named else ""
    with without_hooks(model) as stand_in:
        if traits.ordered:
            failed = f"it failed with {reach} columns in its cache"
            with telling(lambda error: _unreadable(model, f"{failed}: {error}", limit)):
                _read_columns(stand_in, reach)
        else:
            _read_further_positions(stand_in, traits, reach, limit)
    _remember(model, replace(traits, reach=reach))


def _read_further_positions(model: PreTrainedModel, traits: ModelTraits, reach: int, limit: str) -> None:
    """`read_further` of a model that takes positions; `limit` is what would avoid an error, or empty."""
    before, after, rounding, _, changed, allowed = _compare_at(model, reach, limit)
    fits = _fit_rotations(model, before, after, reach, traits.rotations)
    for layer_idx, (left, found) in enumerate(fits):
        known = [rotation for rotation in traits.rotations[layer_idx] if rotation is not None]
        if left > _tolerance(reach, rounding) or len(found) != len(known):
            raise _unreadable(
                model,
                f"at position {reach} the keys of its layer {layer_idx} are rotated otherwise than up to "
                f"{traits.reach}, so keys of both don't fit together.",
                limit,
            )
    _refuse_change(model, reach, changed, allowed, limit)


STANDS_OUT = 16  # times the median channel of its head; up to that, the codes of the others are many enough


@torch.no_grad()
def read_factors(model: PreTrainedModel, traits: ModelTraits) -> ModelTraits:
    """`traits` with the `factors` of channels that stand out, by what `model` caches of a few short texts.

    In some models a few channels of the keys are far larger than all others, in every token (arXiv:2402.02750).
    """
    if traits.factors is not None:
        return traits
    length = max(min(16, traits.trained_length or 16), 3)
    with without_hooks(model) as stand_in:
        _, cache = _run(stand_in, some_tokens(stand_in, length), None if traits.ordered else 0)
    factors = []
    for layer, (rotation, _) in zip(keys_and_values(cache), traits.rotations):
        found = {name: _factors(layer[name], _of(rotation, name)) for name in ("keys", "values") if name in layer}
        factors.append({name: each for name, each in found.items() if each is not None})
    traits = replace(traits, factors=factors)
    _remember(model, traits)
    return traits


def _factors(states: torch.Tensor, rotations: list[Rotation]) -> Optional[torch.Tensor]:
    """Powers of two near how much larger each channel of `states` is than the median one of its head.

    Args:
        states: `[rows, kv_heads, tokens, head_dim]`. The first tokens are left out: they are no example of later ones.
        rotations: the one by which `states` rotate, if they do. The two dimensions of a pair have the same factor.

    Returns:
        float32 `[kv_heads, head_dim]`, at least 1; None if no channel stands out.
    """
    sizes = states[:, :, 2:].float().abs()
    for rotation in rotations:
        pairs = rotation.pairs(sizes)
        pairs.copy_(pairs.norm(dim=-1, keepdim=True).expand_as(pairs))
    sizes = sizes.movedim(1, 0).flatten(1, 2).median(dim=1).values  # [kv_heads, head_dim]
    ratios = sizes / sizes.median(dim=-1, keepdim=True).values.clamp(min=torch.finfo(torch.float32).tiny)
    return 2 ** ratios.clamp(min=1).log2().round() if ratios.max() >= STANDS_OUT else None


def _of(rotation: Optional[Rotation], tensor: str) -> list[Rotation]:
    """`rotation`, if it is one of what layers cache as `tensor`."""
    return [rotation] if rotation is not None and rotation.tensor == tensor else []


def fingerprint_of(model: PreTrainedModel, traits: ModelTraits) -> torch.Tensor:
    """The fingerprint of `model`, which has these traits, as it is now. It runs only if it was changed since."""
    stamp, read = _readings.get(model, (None, None))
    if read is not None and stamp.fits(model) and stamp.numbers == some_numbers(modules_of(model)):
        return read.fingerprint
    with torch.no_grad(), without_hooks(model) as stand_in:
        return _fingerprint(_run_on_columns(stand_in, 1)[0] if traits.ordered else _cached_at(stand_in, 0))


def are_alike(fingerprint: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both fingerprints are of one model, in whatever dtypes."""
    return fingerprint.shape == other.shape and bool((fingerprint - other).norm() <= 0.1 * other.norm())


# The rotation that fits


def _tolerance(distance: int, rounding: float) -> float:
    """What rounding may leave of keys, as a part of their length, after a rotation by `distance` positions."""
    return 4 * (rounding + distance * torch.finfo(torch.float32).eps)


def _fit_rotations(
    model: PreTrainedModel, before: list[dict], after: list[dict], distance: int, known: Optional[list[tuple]] = None
) -> list[tuple[float, dict[str, Rotation]]]:
    """Which rotations take what layers cache of single tokens `before` to that of `after`, `distance` positions later.

    Only those that are `known`, as in `ModelTraits`, are tried if these are given.

    Returns:
        For each layer, the most that is left of the difference of a tensor, as a part of its length; and the rotations
        by the name of the tensor that they rotate.
    """
    possible = functools.cache(lambda tensor, head_dim: list(_candidates(model, head_dim, tensor)))
    found = []
    for layer_idx, (first, second) in enumerate(zip(before, after)):
        most, rotations = 0.0, {}
        for name, states in first.items():
            tensor = name.removeprefix("indexer_")
            candidates = possible(tensor, states.shape[-1]) if known is None else [known[layer_idx][tensor != name]]
            candidates = [each for each in candidates if each is not None and each.tensor == tensor]
            left, rotation = _fit_rotation(states.cpu(), second[name].cpu(), distance, candidates)
            most = max(most, left)
            if rotation is not None:
                rotations[name] = rotation
        found.append((most, rotations))
    return found


def _fit_rotation(
    before: torch.Tensor, after: torch.Tensor, distance: int, candidates: list[Rotation]
) -> tuple[float, Optional[Rotation]]:
    """The rotation by `distance` that takes `before` nearest to `after`: `[batch, kv_heads, 1, head_dim]` both.

    Returns:
        The norm of the difference that is left, as a part of that of `after`; and the rotation, or None if no rotation
        at all is as near, as where keys are zero.
    """
    before, after = before.float(), after.float()

    def error(rotation: Optional[Rotation]) -> float:
        rotated = rotation.rotate_(before.clone(), [distance]) if rotation else before
        return float((rotated - after).norm() / after.norm().clamp(min=torch.finfo(torch.float32).tiny))

    best = min([None, *candidates], key=error)
    return error(best), best


def _candidates(model: PreTrainedModel, head_dim: int, tensor: str) -> Iterator[Rotation]:
    """Every rotation of keys of `head_dim` dimensions by what may be frequencies anywhere in the model.

    They are tried as they are, and from fast to slow: some models keep them by the axes of an image (ERNIE 4.5 VL).
    """
    seen: list[torch.Tensor] = []
    found = itertools.chain.from_iterable(map(_frequencies, model.modules()))
    for frequencies in (ordered for each in found for ordered in (each, each.sort(descending=True).values)):
        if 2 * frequencies.numel() > head_dim or any(torch.equal(frequencies, other) for other in seen):
            continue
        seen.append(frequencies)
        for start in sorted({0, head_dim - 2 * frequencies.numel()}):
            for interleaved in (False, True):
                for direction in (1, -1):
                    yield Rotation(direction * frequencies, start, interleaved, tensor)


def rotate_alike(rotations: dict[str, Rotation], others: dict[str, Rotation]) -> bool:
    """Whether layers rotate their keys alike, but for a cast that rounded their frequencies."""
    return rotations.keys() == others.keys() and all(
        (one.start, one.interleaved, one.tensor) == (other.start, other.interleaved, other.tensor)
        and one.frequencies.shape == other.frequencies.shape
        and torch.allclose(one.frequencies, other.frequencies, rtol=2**-8, atol=1e-6)
        for one, other in zip(rotations.values(), others.values())
    )


# Its runs on a few tokens


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model knows. Its table of embeddings may be empty while it does not run."""
    named = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return min(size for size in (named, model.get_input_embeddings().weight.shape[0]) if size)


def some_tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Four rows of `length` tokens, int64."""
    tokens = torch.arange(4 * length, dtype=torch.long, device=input_device(model)).view(4, length)
    return tokens % vocabulary(model)


def _single_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Four rows of a token, int64 `[4, 1]`. They are spread over the vocabulary, so that no odd one decides alone."""
    tokens = [[vocabulary(model) * part // 8] for part in (1, 3, 5, 7)]
    return torch.tensor(tokens, dtype=torch.long, device=input_device(model))


def _run(
    model: PreTrainedModel, tokens: torch.Tensor, start: Optional[int] = 0, cache: Any = None, **kwargs: Any
) -> tuple[Any, DynamicCache]:
    """Run the model on `tokens` (int64 `[rows, length]`), and return its output and the cache, a new one or the given.

    It always has a cache, because without one it takes positions above 0 for those of several texts in a row. The first
    token has position `start`; if that is None, no positions are given. Logits that rule a token out become 0.
    """
    cache = default_cache(model.config) if cache is None else cache
    if start is not None:
        positions = torch.arange(start, start + tokens.shape[1], dtype=torch.long, device=tokens.device)
        kwargs["position_ids"] = positions.repeat(len(tokens), 1)  # some take a view, for which rows can't be shared
    output = model(input_ids=tokens, use_cache=True, **{cache_name(model.forward): cache}, **kwargs)
    ruled_out = output.logits.abs() >= torch.finfo(output.logits.dtype).max
    output.logits = output.logits.masked_fill(ruled_out, 0)
    return output, cache


def _cached_at(model: PreTrainedModel, position: int) -> list[dict[str, torch.Tensor]]:
    """What each layer caches for four single tokens at `position`: `[4, kv_heads, 1, head_dim]` each."""
    return keys_and_values(_run(model, _single_tokens(model), position)[1])


def _logits_at(model: PreTrainedModel, start: int) -> torch.Tensor:
    """The logits of four rows of four tokens from position `start` on: `[4, 4, vocabulary]`."""
    return _run(model, some_tokens(model, 4), start)[0].logits


def _last_states_at(model: PreTrainedModel, start: int) -> torch.Tensor:
    """The states of the same tokens before the head, for a model whose head is zero: `[4, 4, hidden_size]`."""
    return _run(model, some_tokens(model, 4), start, output_hidden_states=True)[0].hidden_states[-1]


class _ColumnsAlike(DynamicCache):
    """A cache in which the one new token of each row stands in all of `number` columns. It takes no memory for them.

    What each layer `cached` is the `keys` and `values` of the token.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number, self.cached = number, {}

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.number - 1

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        return self.number, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        self.cached[layer_idx] = {"keys": keys, "values": values}
        return tuple(states.expand(-1, -1, self.number, -1) for states in (keys, values))


def _run_on_columns(model: PreTrainedModel, number: int) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """What each layer caches for four single tokens, each the last of `number` columns alike; and their logits."""
    tokens = _single_tokens(model)
    mask = torch.ones(4, number, dtype=torch.long, device=tokens.device)
    output, cache = _run(model, tokens, None, _ColumnsAlike(number), attention_mask=mask)
    return [cache.cached[layer_idx] for layer_idx in sorted(cache.cached)], output.logits


def _fingerprint(cached: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What a model is known by, from what it `cached` for single tokens: its last keys, float32 on the CPU."""
    return [layer for layer in cached if layer][-1]["keys"].float().cpu()


def _rounding(model: PreTrainedModel, cached: list[dict[str, torch.Tensor]]) -> float:
    """The relative rounding of what attention gets, by the dtypes of the model and of what it `cached`.

    Sines and cosines have the embedded tokens' dtype, whatever that of the keys.
    """
    dtypes = {model.dtype, model.get_input_embeddings().weight.dtype}
    dtypes |= {states.dtype for layer in cached for states in layer.values()}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The relative difference of the row that differs least. In others rounding may send a token to another expert."""
    expected, actual = expected.float().flatten(1), actual.float().flatten(1)
    norms = expected.norm(dim=-1)
    if not norms.any():
        return float(actual.norm())
    return float(((expected - actual).norm(dim=-1) / norms)[norms != 0].min())


def _compare_at(
    model: PreTrainedModel, distance: int, limit: str = ""
) -> tuple[list, list, float, torch.Tensor, float, float]:
    """Run a few tokens at the first positions, and again up to position `distance`. The `limit` is of `cant_stream`.

    Returns:
        What each layer caches of four single tokens at position 0, and at `distance`.
        The relative rounding.
        The logits of four rows of four tokens from position 0 on: `[4, 4, vocabulary]`.
        By how much these change where they end at `distance`, as a part of their length; and by how much they may.
        Both are 0 if `distance` is below 4.

    Raises:
        ValueError: the model fails, or what it gives is NaN or infinite.
    """
    failed = f"it failed on a few tokens at positions 0 and {distance}, off which its rotation is read"
    with telling(lambda error: _unreadable(model, f"{failed}: {error}", limit)):
        before, after = _cached_at(model, 0), _cached_at(model, distance)
        rounding, logits, changed, allowed = _rounding(model, before), _logits_at(model, 0), 0.0, 0.0
        if distance >= 4:
            here, one_on, there = logits, _logits_at(model, 1), _logits_at(model, distance - 3)
            if not here.any():
                here, one_on, there = (_last_states_at(model, start) for start in (0, 1, distance - 3))
            noise = _difference(here, one_on)  # one position on, everything is rounded anew
            changed, allowed = _difference(here, there), 4 * noise + _tolerance(distance, rounding)
    wrong = [
        f"the keys and values of its layer {layer_idx}"
        for layer_idx, layer in enumerate(before)
        if not all(states.isfinite().all() for states in layer.values())
    ]
    if wrong or math.isnan(changed):
        raise _unreadable(
            model,
            f"{(wrong or ['its logits'])[0]} are NaN or infinite for a few tokens, off which its rotation is read. "
            "Look at its weights, or load it in a wider dtype.",
            limit,
        )
    return before, after, rounding, logits, changed, allowed


# What they show


def _read_columns(model: PreTrainedModel, number: int) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Run single tokens in a column of their own, and as the last of `number` columns.

    All columns hold the same token. So whatever weights a bias gives them, attention gives what it does for one.

    Returns:
        What each layer caches of four single tokens, and the relative rounding.
    """
    first, logits = _run_on_columns(model, 1)
    if not first or len(first) < len(default_layers(model)):
        raise ValueError("it does not cache the keys and values of its layers")
    last, other_logits = _run_on_columns(model, number)
    rounding = _rounding(model, first)
    changes = [_difference(layer[name], other[name]) for layer, other in zip(first, last) for name in layer]
    changes.append(_difference(logits, other_logits))
    if not all(map(math.isfinite, changes)):
        raise ValueError("what it gives is NaN or infinite for a few tokens (look at its weights, or their dtype)")
    # The first layer gets the token itself, and later ones what attention has rounded.
    allowed = _tolerance(number, rounding)
    if max(changes[:2]) > allowed or max(changes) > 4 * allowed:
        raise ValueError(
            f"what it makes of a token changes with its place in the sequence, as where a vector is learned for each. "
            f"Between the first and the last of {number} columns it differs by {max(changes):.2g} of its length "
            f"(rounding: {allowed:.2g})"
        )
    return first, rounding


def _refuse_seen_padding(model: PreTrainedModel, rounding: float) -> None:
    """Raise if padding before five tokens, of which the last comes alone, changes what `model` gives for it."""
    tokens, logits = some_tokens(model, 9), []
    for start in (4, 0):  # the first four are padding
        mask = (torch.arange(start, 9, dtype=torch.long, device=tokens.device) >= 4).long().expand(4, -1)
        _, cache = _run(model, tokens[:, start:8], None, attention_mask=mask[:, :-1])
        logits.append(_run(model, tokens[:, 8:], None, cache, attention_mask=mask)[0].logits)
    changed, allowed = _difference(*logits), max(1e-5, 16 * rounding)
    if changed > allowed:
        raise ValueError(f"padding changes what it gives, by {changed:.2g} of its length (rounding: {allowed:.2g})")


def _refuse_mixing(model: PreTrainedModel, together: torch.Tensor, allowed: float) -> None:
    """Raise if what two tokens of a row give changes where two more come after them, and another row beside them.

    The logits of four rows of four tokens are `together`. What two give may change by a part `allowed` of its length.
    """
    alone = _run(model, some_tokens(model, 4)[1:, :2])[0].logits
    changed = _difference(together[1:, :2], alone)
    if changed > allowed:
        raise _unreadable(
            model,
            "what it gives for a token depends on tokens after it, or on the other rows of a batch, as where attention "
            "is bidirectional. Then it would depend on how a text is cut into updates. What two tokens give differs by "
            f"{changed:.2g} of its length where more come with them (rounding: {allowed:.2g}).",
        )


def _ignores_cache_order(model: PreTrainedModel, rounding: float) -> bool:
    """Whether a token gives the same if the 16 before it stand in the cache in reverse order."""
    tokens, logits = some_tokens(model, 17), []
    for reverse in (False, True):
        _, cache = _run(model, tokens[:, :16])
        for layer in cache.layers:
            if reverse and getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
        logits.append(_run(model, tokens[:, 16:], 16, cache)[0].logits)
    return _difference(*logits) <= max(1e-5, 4 * rounding)


def _keeps_states(model: PreTrainedModel) -> bool:
    """Whether a layer of the model keeps a recurrent state."""
    return any(map(keeps_state, default_layers(model)))


def _continues_states(model: PreTrainedModel, rounding: float) -> bool:
    """Whether two tokens after seven leave the states of the model's layers as nine at once do."""
    if not _keeps_states(model):
        return True
    tokens = some_tokens(model, 9)
    _, whole = _run(model, tokens)
    _, parts = _run(model, tokens[:, :7])
    _run(model, tokens[:, 7:], 7, parts)
    # A wrong state shows in its own layer or in the next one that has a state. Further on there is more noise.
    states = [layer_idx for layer_idx, layer in enumerate(whole.layers) if keeps_state(layer)]
    noise = max(1e-4, 4 * rounding)
    return all(
        float((kept.float() - other.float()).norm()) <= noise * float(kept.float().norm())
        for here, there in zip(whole.layers[: states[:2][-1] + 1], parts.layers)
        for kept, other in zip(layer_tensors(here).values(), layer_tensors(there).values())
    )


def _continues_positions(model: PreTrainedModel, rounding: float) -> bool:
    """Whether a model that keeps states, and is given no positions, puts a second token at position 1."""
    if not _keeps_states(model):
        return True
    tokens, keys = some_tokens(model, 2), []
    for start in (None, 1):
        _, cache = _run(model, tokens[:, :1], None)
        _run(model, tokens[:, 1:], start, cache)
        keys.append([layer["keys"] for layer in keys_and_values(cache) if layer][-1])
    return _difference(*keys) <= 4 * rounding


def _rotates_by_axes(model: PreTrainedModel, rotations: list[tuple], rounding: float) -> bool:
    """Whether tokens with another position on each axis move by these rotations when they move alike on all axes.

    They do where the two dimensions of each pair turn with the same axis. Models without such positions are not tried.
    """
    if not any("rope_deltas" in vars(module) for module in model.modules()):
        return False
    tokens, distance = _single_tokens(model), 97
    for num_axes in (3, 4):
        axes = torch.arange(1, 3 * num_axes + 1, 3, dtype=torch.long, device=tokens.device)
        axes = axes[:, None, None].expand(-1, len(tokens), 1)
        try:
            runs = [_run(model, tokens, None, position_ids=positions)[1] for positions in (axes, axes + distance)]
        except MODEL_ERRORS as error:
            if is_of_machine(error):
                raise
            continue  # it has another number of them
        fits = _fit_rotations(model, *map(keys_and_values, runs), distance, rotations)
        return all(left <= _tolerance(distance, rounding) for left, _ in fits)
    return False


def _inverts_masks(model: PreTrainedModel, dtype: torch.dtype, rounding: float) -> bool:
    """Whether in a mask of four dimensions the model takes 1 for what is seen, and 0 for what is not.

    Some code that comes with a model does. Models of transformers add the mask to their scores, so that 0 is seen.
    Models with layers of several kinds are not tried. Code that makes something else of such a mask is refused.
    """
    if not takes_masks(model) or layer_classes(default_layers(model)) - {*FULL_LAYERS}:
        return False
    tokens, expected = some_tokens(model, 4), _logits_at(model, 0)
    sees = torch.ones(4, 1, 4, 4, dtype=torch.bool, device=tokens.device).tril()
    changed, failed = [], "its code takes no mask over keys, `[batch, 1, tokens, keys]`"
    with telling(lambda error: cant_stream(model, f"{failed}: {error}")):
        for mask in (additive_mask(sees, dtype), sees.to(dtype)):
            changed.append(_difference(expected, _run(model, tokens, attention_mask=mask)[0].logits))
    if not min(changed) <= max(1e-5, 16 * rounding):
        raise cant_stream(model, "its code makes something else of a mask over keys, `[batch, 1, tokens, keys]`.")
    return changed[1] < changed[0]


# Why it can't be read


def _unreadable(model: PreTrainedModel, reason: str, limit: str = "") -> ValueError:
    """`cant_stream` for a `reason` that the runs of the model showed. Training mode may have caused it."""
    training = " It is in training mode, where dropout changes what it does: call `model.eval()` first."
    return cant_stream(model, reason + training if model.training else reason, limit)


def _refuse_change(model: PreTrainedModel, distance: int, changed: float, allowed: float, limit: str = "") -> None:
    """Raise if what a model gives has `changed` by more than is `allowed`, as its tokens were moved by `distance`."""
    if not changed <= allowed:
        raise _unreadable(
            model,
            "what its tokens see of each other changes when all move by the same distance, and a stream moves them to "
            f"keep positions bounded. What four tokens give at positions up to {distance} differs by {changed:.2g} of "
            f"its length from what they give at the first positions (rounding: {allowed:.2g}).",
            limit,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Layers of a model: one for each of its own
# ---------------------------------------------------------------------------------------------------------------------


def make_layers(window: Window, traits: ModelTraits) -> list:
    """A new layer for each of the model's: one with sinks where it has full attention, else transformers' own."""
    layers, rings = [], {}

    def ring_of(rotation: Optional[Rotation], layout: tuple, ring_class: type[Ring]) -> Ring:
        if (rotation, layout) not in rings:
            rings[rotation, layout] = ring_class(window, rotation)
        return rings[rotation, layout]

    kind_of_ring = CodedRing if window.bits else Ring

    own_layers = itertools.chain(traits.own_layers, itertools.repeat(None))
    for layer, (rotation, index_rotation), layout in zip(own_layers, traits.rotations, traits.layouts):
        has_state, stays = keeps_state(layer), layer_classes([layer]) <= {*UNTOUCHED_LAYERS}
        if stays or (layer is not None and not layout):
            layers.append(untouched(layer, rotation, holds_text=bool(layout) or has_state, has_kind=stays))
        elif has_state:
            layers.append(StateAndSinkLayer(layer.number_of_states, ring_of(rotation, layout, kind_of_ring)))
        elif len(layout) > 2:
            index_ring = ring_of(index_rotation, layout[2:], Ring)
            layers.append(IndexedLayer(ring_of(rotation, layout, kind_of_ring), index_ring))
        else:
            layer_class = OrderedLayer if traits.ordered else SinkLayer
            layers.append(layer_class(ring_of(rotation, layout, kind_of_ring)))
    if window.bits is not None:
        for layer, factors in zip(layers, traits.factors):
            if layer.follows_plan:
                layer.ring.factors.append(factors)
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of `generate`: what a call is told, and the columns of its prompt
# ---------------------------------------------------------------------------------------------------------------------


def integer(name: str, value: Any, least: Optional[int] = None, of: str = "tokens") -> int:
    """`value`, an integer of any type, as an int.

    Raises:
        TypeError: it is none. The error names the argument, and says what it is a number `of`.
        ValueError: it is below `least`.
    """
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int (a number of {of}), got {value!r}.") from None
    if least is not None and number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
    return number


def checked_window(window_length: Any, num_sink_tokens: Any, kv_bits: Any = None) -> Window:
    """The window of these arguments of `SinkCache`; TypeError or ValueError unless they are ints in range."""
    if kv_bits is not None and integer("kv_bits", kv_bits, of="bits") != 8:
        raise ValueError(f"`kv_bits` must be 8, or None for keys and values as the model makes them, got {kv_bits}.")
    window_length = integer("window_length", window_length, least=1)
    num_sink_tokens = integer("num_sink_tokens", num_sink_tokens)
    if not 0 <= num_sink_tokens < window_length:
        raise ValueError(
            f"`num_sink_tokens` must be at least 0 and less than `window_length` ({window_length}), which counts "
            f"the sinks too, got {num_sink_tokens}."
        )
    return Window(window_length, num_sink_tokens, None if kv_bits is None else 8)


def resolve_setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """The value that `generate` will use: an argument wins over `generation_config`, and that over the model's."""
    configs = kwargs.get("generation_config"), model.generation_config
    values = kwargs.get(name), *(getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _asked_for(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """What a call asks of the cache; None if the model's files say the same, as training leaves `use_cache: false`."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    asked = getattr(kwargs.get("generation_config"), name, None)
    files = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    return None if asked in [getattr(config, name, None) for config in files] else asked


def assisted_by(model: PreTrainedModel, kwargs: dict[str, Any]) -> Optional[str]:
    """The argument of `generate` that asks for assisted decoding (arXiv:2211.17192), None if there is none."""
    names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    return next((name for name in names if resolve_setting(model, kwargs, name)), None)


def left_padding(attention_mask: Optional[torch.Tensor], given: bool = True) -> list[int]:
    """How many columns of left padding `attention_mask` (`[batch, columns]`) has: `[rows]`. Other padding is refused.

    If it was not `given` by the user, transformers made it of the pad tokens in the prompt.
    """
    if attention_mask is None:
        return [0]
    attended = attention_mask.bool()
    if attended.dim() != 2 or not attended[:, -1].all() or (attended[:, :-1] & ~attended[:, 1:]).any():
        if not given:
            raise ValueError(
                "`attention_mask` was not given, and `input_ids` have the pad token elsewhere than at the left, which "
                "transformers takes for padding. Pass `attention_mask=torch.ones_like(input_ids)` if it belongs to the "
                "text, and pad on the left if not."
            )
        raise ValueError(
            "`attention_mask` must be left padding only, `[batch, tokens]`: zeros, then ones up to the last token of "
            'each row. Set `padding_side="left"` on the tokenizer.'
        )
    pads = (~attended).sum(dim=-1).tolist()
    return pads[:1] if len(set(pads)) == 1 else pads


def prompt_ids(kwargs: dict[str, Any]) -> Optional[torch.Tensor]:
    """The ids among the arguments of `generate`: int64 `[batch, length]`."""
    return kwargs.get("inputs") if kwargs.get("input_ids") is None else kwargs["input_ids"]


def prompt_columns(kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """How many columns the conversation has with this call's prompt; ValueError if that has no token.

    Returns:
        The columns, at the most of ids, embeddings and mask; how many of them `input_ids` leave out; and how many both
        `input_ids` and `inputs_embeds` leave out.
    """
    names = ("inputs", "input_ids", "inputs_embeds")
    given = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), torch.Tensor)}
    if given and not any(tensor.numel() for tensor in given.values()):
        name, tensor = next(iter(given.items()))
        raise ValueError(
            f"`{name}` must have a token of each row to go on from, got {list(tensor.shape)}. Begin with the "
            "tokenizer's `bos_token_id` where there is no text yet."
        )
    ids, embedded, masked = (
        0 if tensor is None else tensor.shape[1]
        for tensor in (prompt_ids(kwargs), kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
    )
    columns = max(ids, embedded, masked)
    return columns, columns - ids, columns - max(ids, embedded)


# The inputs that tell a model the types of tokens.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# The model's inputs with an entry for each column, in their last dimension; embeddings have it in the last but one.
PER_COLUMN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", *TOKEN_TYPES)
KNOWN_BY_IDS = {"input_ids", "attention_mask", CACHE, OLDER_NAME, "use_cache", "cache_position"}
KNOWN_BY_IDS |= {"output_attentions", "output_hidden_states", "return_dict"}


def new_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """The ids, or embeddings, among the model's inputs: `[batch, length, ...]`."""
    return inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]


def slice_inputs(inputs: dict[str, Any], columns: slice) -> dict[str, Any]:
    """A copy of the model's inputs that has only some of their columns. Masks stay whole."""
    given = {name: inputs[name] for name in PER_COLUMN_INPUTS if isinstance(inputs.get(name), torch.Tensor)}
    return inputs | {
        name: value[:, columns] if name == "inputs_embeds" else value[..., columns] for name, value in given.items()
    }


def cut_at(chunks: list[slice], column: int) -> list[slice]:
    """The same columns as these chunks, cut before `column` too if it is among them."""
    ends = sorted({chunk.stop for chunk in chunks} | {min(max(column, 0), chunks[-1].stop)} - {0})
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def is_known_by_ids(inputs: dict[str, Any]) -> bool:
    """Whether ids, mask and images or the like say all of the model's inputs."""
    around = {*TOKEN_TYPES, *media_inputs(inputs), *KNOWN_BY_IDS}
    return all(value is None or name in around for name, value in inputs.items())


def media_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The images or the like among the model's inputs, or the arguments of `generate`."""
    text = {*PER_COLUMN_INPUTS, "inputs", "attention_mask"}
    return {name: value for name, value in inputs.items() if name not in text and _holds_numbers(value)}


def _holds_numbers(value: Any) -> bool:
    """Whether a value is a tensor with numbers in it, a list with such a tensor, or a dict that is not empty."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    return len(value) > 0 if isinstance(value, dict) else isinstance(value, list) and any(map(_holds_numbers, value))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: arguments that can't be served correctly
# ---------------------------------------------------------------------------------------------------------------------


def refuse_dropped_settings(model: PreTrainedModel, missing: list[str]) -> None:
    """Raise ValueError if the model's `generation_config.json` has one of the `missing` arguments, and it was dropped.

    transformers drops what it doesn't know from a file with `"_from_model_config": true`. It once wrote that by itself.
    """
    if not missing or not getattr(model.generation_config, "_from_model_config", False) or not model.name_or_path:
        return
    path = _file_of(model, "generation_config.json")
    if path is None:
        # A model that has none gets the same mark. It is found by its `config.json`, if it is where it was.
        # Of bits nothing is said: that there are none can't be passed.
        if _file_of(model, "config.json") is None and missing != ["kv_bits"]:
            _logger.warning_once(
                f"`{missing[0]}` was not given, so it is the default. Whether the model's `generation_config.json` "
                f"names it can't be seen: {model.name_or_path!r} is not found any more, or not in this revision."
            )
        return
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    for name in missing:
        if settings.get(name) is not None:
            raise ValueError(
                f"`{name}` is {settings[name]} in the model's `generation_config.json`, but transformers dropped it: "
                f'the file says "_from_model_config": true. Delete that entry from {path!r}, or pass `{name}`.'
            )


def _file_of(model: PreTrainedModel, name: str) -> Optional[str]:
    """The path of a file that was loaded with the model; None if it has no such file, or it can't be found again."""
    commit = getattr(model.config, "_commit_hash", None)  # until 5.17 a model knows of which commit it is
    try:
        return transformers.utils.cached_file(model.name_or_path, name, revision=commit, local_files_only=True)
    except (OSError, ValueError):  # until 4.57 a folder that is gone is no valid name
        return None


# What a stream can't serve. For each argument: the value besides None that asks for nothing, and what the error says.
# These are about the cache and its columns.
REFUSED_ARGUMENTS = {
    "use_cache": (True, "must not be False: streaming is what the cache does. Pass `use_cache=True`."),
    "cache_implementation": (None, "must not be given, got {value!r}: the cache is a `SinkCache`. Leave it out."),
    "return_legacy_cache": (False, "must not be True: a tuple of keys and values is no `SinkCache`. Leave it out."),
    "position_ids": (None, "must not be given: a stream chooses positions that stay bounded. Leave it out."),
}
# And these ask for another way of decoding.
REFUSED_MODES = {
    name: (
        1,  # as one group of beams
        f"asks for {mode}, which transformers {transformers.__version__} loads from a repository of its own, and a "
        "stream is another. Leave it out.",
    )
    for name, mode in MOVED_MODES.items()
}
REFUSED_MODES["penalty_alpha"] = (0, "asks for contrastive search, which looks at all tokens of before. Leave it out.")


def refuse_other_code(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if `custom_generate` is other code than this, which would be left out without a word."""
    name = kwargs.get("custom_generate")
    where = {key: kwargs[key] for key in WHERE_ON_THE_HUB if key in kwargs}
    if isinstance(name, (str, os.PathLike)):
        with contextlib.suppress(OSError, ValueError):  # it is nowhere
            path = transformers.utils.cached_file(name, "custom_generate/generate.py", **where)
            with open(path, encoding="utf-8") as file:
                if "\nclass SinkCache(Cache):" in file.read():
                    return
    if name is not None:
        raise ValueError(
            f"`custom_generate` asks for another way of decoding, and a stream is one itself, got {name!r}. Leave it "
            f"out, or call transformers' own `generate` with it, and with `{CACHE}=SinkCache(...).bind(model)`."
        )


def refuse_arguments(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of `generate` that a stream can't serve."""
    for look_up, refused in ((_asked_for, REFUSED_ARGUMENTS), (resolve_setting, REFUSED_MODES)):
        for name, (harmless, reason) in refused.items():
            value = look_up(model, kwargs, name)
            if value is not None and (harmless is None or value != harmless):
                raise ValueError(f"`{name}` {reason.format(value=value)}")


def refuse_assistance(model: PreTrainedModel, stream: Any, kwargs: dict[str, Any], name: str) -> None:
    """Raise ValueError if the drafts that `name` asks for can't be checked, or taken back, as exactly as single tokens.

    Args:
        stream: a `Stream` of the model.
        name: the argument, by `assisted_by`.
    """
    if name == "use_mtp" or resolve_setting(model, kwargs, "speculation_type") == "dflash":
        raise ValueError(
            f"`{name}` can't be used in a stream: its layers draft from what the model made of all tokens, in a cache "
            "of their own that grows with them. Use `prompt_lookup_num_tokens` or an `assistant_model`."
        )
    if kwargs.get("assistant_tokenizer") is not None and resolve_setting(model, kwargs, "do_sample"):
        raise ValueError(
            "`assistant_tokenizer` can't be used with `do_sample`: transformers puts another head and other embeddings "
            "into the assistant then, for good. Leave one of them out, or use an assistant with the model's tokenizer."
        )
    if is_synced(model, kwargs.get("synced_gpus")):
        raise ValueError(
            f"`{name}` can't be used with `synced_gpus`: a rank that is done goes on, and assisted decoding of "
            "transformers has it append tokens. Leave one of them out."
        )
    if stream.traits.ordered:
        raise ValueError(
            f"`{name}` checks several tokens at once, which this model ({type(model).__name__}) can't do exactly past "
            "the window: it knows the order of tokens by the columns of its cache, and those are others for each of "
            "them. Leave it out, or use a model with rotary position embeddings (RoPE)."
        )
    if not takes_masks(model):
        raise ValueError(
            f"`{name}` checks several tokens at once, which needs a mask that this model's `attn_implementation`, "
            'flash attention, does not take. Load the model with "sdpa", or leave it out.'
        )
    if not all(layer.can_record for layer in stream.layers):
        raise ValueError(
            f"`{name}` asks for a decoding mode that takes tokens back, which some layers of `model` "
            f"({type(model).__name__}) can't with transformers {transformers.__version__}: they slide or keep a state. "
            "Leave it out, or use a model with full attention in its layers."
        )
    number = resolve_setting(model, kwargs, "prompt_lookup_num_tokens")
    length = stream.window.length
    if number is not None and number >= length:
        raise ValueError(f"`prompt_lookup_num_tokens` must be less than `window_length` ({length}), got {number}.")


def refuse_cache(cache: Any, window: dict[str, Optional[int]]) -> None:
    """Raise TypeError unless the `cache` that was passed is a `SinkCache`, and ValueError unless it has the `window`.

    Of that, `window_length` or `num_sink_tokens` is None where it was not passed.
    """
    # By name: the same file loaded from the Hub and from a folder is two modules, with a class each.
    if not any(cls.__name__ == "SinkCache" and hasattr(cls, "bind") for cls in type(cache).__mro__):
        raise TypeError(
            f"`{CACHE}` must be this repository's `SinkCache`, got {type(cache).__module__}.{type(cache).__name__}. "
            "Leave it out to start a new one."
        )
    for name, value in window.items():
        if value is not None and value != getattr(cache, name):
            raise ValueError(
                f"`{name}` is {value}, but the `SinkCache` in `{CACHE}` was made with {getattr(cache, name)}. Leave "
                f"`{name}` out, or use a new cache."
            )


def refuse_gap(kwargs: dict[str, Any], seen: int, end: int) -> None:
    """Raise ValueError unless the arguments of `generate` go on from column `end`, and have at least one new column.

    The cache has seen `seen` columns, of which those from `end` on can be taken back.
    """
    columns, _, start = prompt_columns(kwargs)
    if 0 < columns <= end:
        raise ValueError(
            f"`input_ids` must be the whole conversation, longer than the {seen} tokens that the `SinkCache` in "
            f"`{CACHE}` has seen, got {columns}; or only what is new, with the `attention_mask` of all. Don't "
            "crop it to `get_max_length()`. To start another one, `reset()` it."
        )
    if end < start < columns:
        raise ValueError(
            f"`input_ids` must go on after the {end} tokens that the `SinkCache` has seen, but are the last "
            f"{columns - start} of the {columns} in `attention_mask`: {start - end} are missing. The last token that "
            "was generated has not been seen, so pass it too."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Stream: a bound cache at work
# ---------------------------------------------------------------------------------------------------------------------


class WithoutGraph(torch.autograd.Function):
    """Copies of `keys` and `values` off the slots, which know nothing of the graph of the states that went in."""

    @staticmethod
    def forward(ctx, keys: torch.Tensor, values: torch.Tensor, *states: torch.Tensor) -> tuple:
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> None:
        raise ValueError(
            "`backward` can't go through a bound `SinkCache`, which keeps no graph of its keys and values. Call the "
            f"model with a `DynamicCache`, or without `{CACHE}`, where gradients are needed."
        )


MOST_PARTS = 64  # of a `Transcript`, before they are joined


@dataclass(frozen=True, eq=False)
class Transcript:
    """What is known of the ids in the columns seen, by which other ids are known to continue them or not.

    That is the latest ids, and a digest of those of the first columns, so it takes constant memory. Between them may be
    columns whose ids are not known, where the model was called without `prepare_inputs`. It never changes.

    Args:
        digested: of how many of the first columns `digest` is.
        digest: `digest_of` these, None if they are none.
        parts: the latest ids, in order, also of columns not seen yet: the first column, and int64 `[batch, columns]`.
    """

    digested: int = 0
    digest: Optional[torch.Tensor] = None
    parts: tuple[tuple[int, torch.Tensor], ...] = ()

    @property
    def ids(self) -> Optional[torch.Tensor]:
        """The ids of the last part, None if there are none."""
        return self.parts[-1][1] if self.parts else None

    @property
    def end(self) -> int:
        """The column after the last known id."""
        return self.parts[-1][0] + self.ids.shape[1] if self.parts else self.digested

    def common_length(self, input_ids: torch.Tensor, first: int, seen: int, pads: list[int]) -> int:
        """Up to which of the `seen` columns `input_ids` (`[batch, length]`, from column `first` on) may be the same.

        It is 0 if they differ somewhere in the columns that are digested. `pads` are of `Stream`.
        """
        end = first + input_ids.shape[1]
        known = self.ids if self.digest is None else self.digest
        if known is None or len(known) != len(input_ids):
            return min(seen, end)
        if end < self.digested:
            return 0
        if first == 0 and self.digested > 0:
            digest = digest_of(input_ids[:, : self.digested], 0, pads)
            if not torch.equal(digest, self.digest.to(digest.device)):
                return 0
        for known_from, ids in self.parts:
            start, stop = max(first, known_from), min(end, seen, known_from + ids.shape[1])
            if start < stop:
                latest = ids[:, start - known_from : stop - known_from].to(input_ids.device)
                tokens = is_token(start, stop, pads, input_ids.device)
                same = first_difference(input_ids[:, start - first : stop - first] * tokens, latest * tokens)
                if start + same < stop:
                    return start + same
        return min(seen, end)

    def up_to(self, end: int) -> "Transcript":
        """What is known of the columns before `end`."""
        if self.end <= end:
            return self
        parts = tuple(
            (start, ids if start + ids.shape[1] <= end else ids[:, : end - start])
            for start, ids in self.parts
            if start < end
        )
        return replace(self, parts=parts) if self.digested <= end else Transcript(parts=parts)

    def with_ids(self, ids: torch.Tensor, first: int) -> "Transcript":
        """The same with the `ids` of the columns from `first` on, `[batch, length]`, and what is digested."""
        start = max(first, self.digested)
        known = self.up_to(start)
        return replace(known, parts=(*known.parts, (start, ids[:, start - first :])))

    def digested_before(self, column: int, pads: list[int]) -> "Transcript":
        """The same in memory of its own, with a digest for the ids before `column`. Past a gap they are forgotten."""
        runs: list[tuple[int, list[torch.Tensor]]] = []
        end = None
        for start, ids in self.parts:
            if start != end:
                runs.append((start, []))
            runs[-1][1].append(ids)
            end = start + ids.shape[1]
        digested, digest, parts = self.digested, self.digest, []
        for start, pieces in runs:
            ids = torch.cat([piece.to(pieces[-1].device, torch.long) for piece in pieces], dim=1)
            old = ids[:, : max(column - start, 0)]
            if start == digested and old.shape[1] > 0:
                number, digested = digest_of(old, start, pads), start + old.shape[1]
                digest = number if digest is None else digest.to(number.device) + number
            if old.shape[1] < ids.shape[1]:
                parts.append((start + old.shape[1], ids[:, old.shape[1] :].clone()))
        return Transcript(digested, digest, tuple(parts[-MOST_PARTS // 2 :]))

    def with_rows(self, indices: torch.Tensor) -> "Transcript":
        """That of a batch in which row `i` is what row `indices[i]` was."""

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, indices.to(tensor.device))

        digest = None if self.digest is None else rows(self.digest)
        return Transcript(self.digested, digest, tuple((start, rows(ids)) for start, ids in self.parts))


def first_difference(ids: torch.Tensor, others: torch.Tensor) -> int:
    """The first column in which two batches of ids differ, `[batch, columns]` both; the number of columns if none."""
    differing = (ids != others).any(dim=0).nonzero()
    return int(differing[0]) if len(differing) > 0 else ids.shape[1]


def is_token(start: int, stop: int, pads: list[int], device: torch.device) -> torch.Tensor:
    """Whether the columns from `start` to `stop` are no padding: `[rows, columns]`."""
    columns = torch.arange(start, stop, dtype=torch.long, device=device)
    return columns >= torch.tensor(pads, dtype=torch.long, device=device)[:, None]


def digest_of(ids: torch.Tensor, first: int, pads: list[int]) -> torch.Tensor:
    """A number for each row, int64 `[batch]`, that hardly any others have than these `ids` from column `first` on.

    It is the sum, modulo 2**64, of a number for each token, made of its id and its column by the multiplications and
    shifts of SplitMix64. So digests of neighbouring columns add up to that of all, and nothing waits for the device.
    Padding (`pads` of `Stream`) counts nothing.
    """
    digest = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for number, block in enumerate(ids.split(2**16, dim=1)):  # which the processor's cache holds
        start = first + number * 2**16
        columns = torch.arange(start, start + block.shape[1], dtype=torch.long, device=ids.device)
        numbers = block + columns.mul_(0x9E3779B97F4A7C15 - 2**64)
        for factor in (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64):
            numbers.bitwise_xor_((numbers >> 32).bitwise_and_(2**32 - 1)).mul_(factor)
        if start < max(pads):
            numbers *= is_token(start, start + block.shape[1], pads, ids.device)
        digest += numbers.sum(dim=1)
    return digest


@dataclass(frozen=True, eq=False)
class SeenMedia:
    """An image or the like, or a part of it, in the columns from `start` to `end`: their embeddings are not of ids.

    It is known again by the `digest`, float32 `[batch, 8]` on the CPU, made of these embeddings.
    """

    start: int
    end: int
    digest: torch.Tensor

    @staticmethod
    def all_in(embeddings: torch.Tensor, of_ids: torch.Tensor, start: int) -> "list[SeenMedia]":
        """Those of a prompt from column `start` on, which has these `embeddings` instead of those `of_ids`.

        Both are `[batch, length, hidden size]`.
        """
        differ = (embeddings != of_ids).any(-1)
        columns = differ.any(0).nonzero().flatten().tolist()
        firsts = [column for column, before in zip(columns, [None, *columns]) if before != column - 1]
        lasts = [column for column, after in zip(columns, [*columns[1:], None]) if after != column + 1]
        generator = torch.Generator("cpu").manual_seed(0)
        directions = torch.randn(embeddings.shape[-1], 8, generator=generator, dtype=torch.float32, device="cpu")
        places = torch.arange(start, start + embeddings.shape[1], dtype=torch.float32, device=embeddings.device)
        seen = (embeddings.float() * differ[..., None]) @ directions.to(embeddings.device) * places.cos()[:, None]
        return [
            SeenMedia(start + first, start + last + 1, seen[:, first : last + 1].sum(1).cpu())
            for first, last in zip(firsts, lasts)
        ]

    def is_like(self, other: "SeenMedia", rounding: float) -> bool:
        """Whether both are the same, in the same columns, but for the relative `rounding` of their embeddings."""
        if (self.start, self.end, self.digest.shape) != (other.start, other.end, other.digest.shape):
            return False
        apart, size = (self.digest - other.digest).norm(dim=-1), other.digest.norm(dim=-1)
        return bool((apart <= max(1e-3, 4 * rounding) * size).all())

    def with_rows(self, indices: torch.Tensor) -> "SeenMedia":
        """The same of a batch whose row `i` is row `indices[i]` here."""
        return replace(self, digest=self.digest.index_select(0, indices.cpu()))


@dataclass(frozen=True, eq=False)
class Ahead:
    """Which columns of a prompt see later ones, as those of an image do in some models.

    Args:
        start: the first column.
        until: for the kinds of layers, or None for all alike, int64 `[rows, length]` on the CPU: for each column the
            one after the last that it sees.
    """

    start: int
    until: dict[Optional[str], torch.Tensor]

    @classmethod
    def of(cls, start: int, attention_mask: Any) -> "Optional[Ahead]":
        """That of the mask which a model makes for a prompt from column `start` on; None if no column sees a later one.

        The mask is `[batch, heads, length, length]` of booleans, or additive; or there is one for each kind of layer.
        ValueError is raised if a column sees later ones, but not those that come next.
        """
        masks = attention_mask if isinstance(attention_mask, dict) else {None: attention_mask}
        until = {}
        for kind, mask in masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
                continue
            later = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1).triu(1)
            columns = torch.arange(later.shape[1], dtype=torch.long, device=later.device)
            ends = columns + 1 + later.sum(-1)  # of those that come next
            if not torch.equal(later, (columns < ends[:, :, None]) & (columns > columns[:, None])):
                raise ValueError(
                    "`model` can't stream this prompt: tokens see later ones by its mask, but not those that come next."
                )
            if later.any():
                until[kind] = ends.cpu() + start
        return cls(start, until) if until else None

    def in_columns(self, start: int, length: int) -> dict[Optional[str], torch.Tensor]:
        """`until` of these columns, for the kinds of layers where one of them sees a later one."""
        columns = slice(start - self.start, start - self.start + length)
        until = {kind: ends[:, columns] for kind, ends in self.until.items()}
        themselves = torch.arange(start + 1, start + length + 1, dtype=torch.long, device="cpu")
        return {kind: ends for kind, ends in until.items() if ends.shape[1] == length and (ends > themselves).any()}

    def blocks(self) -> list[tuple[int, int]]:
        """The first column, and the one after the last, of each run of columns that an update can't end in."""
        cuts = [self.start, *(self.start + cut for cut in self.cuts(self.start))]
        return [(before, after) for before, after in zip(cuts, cuts[1:]) if after > before + 1]

    def cuts(self, start: int) -> list[int]:
        """After how many columns from `start` on an update may end: none of them sees one of the next."""
        ends = [ends[:, start - self.start :].amax(0).cummax(0).values for ends in self.until.values()]
        until = torch.stack(ends).amax(0).tolist()
        return [number for number, end in enumerate(until, start=1) if end <= start + number]


class CompiledSteps:
    """Single tokens that go in by compiled code, one after another: what such a step is given.

    The additive `mask`, `[rows, 1, 1, window.length]`, hides the slots that are not filled yet. It is given also when
    all are filled: without a mask, the code would be another. It is None before the first step.
    """

    def __init__(self):
        self.mask: Optional[torch.Tensor] = None

    @torch.inference_mode(False)
    def prepare(self, plan: UpdatePlan, layers: list[SinkLayer], dtype: torch.dtype, device: torch.device) -> None:
        """Place the sinks, set the slot indices, note what will be written, and fill in the mask."""
        for ring in dict.fromkeys(layer.ring for layer in layers):
            ring.prepare_compiled(plan)
        undo = Undo(plan.end, 1)
        for layer in layers:
            layer.undo = undo
        if self.mask is None:
            seen = torch.tensor(plan.seen, dtype=torch.long, device=device)[:, None]
            filled = torch.arange(plan.window.length, dtype=torch.long, device=device) <= seen
            self.mask = additive_mask(filled[:, None, None], dtype)
        elif min(plan.seen) < plan.window.length:
            self.mask[range(len(plan.first_slots)), :, :, plan.first_slots] = 0


@torch.compiler.disable
def given_above(name: str) -> list[torch.Tensor]:
    """The tensors of a `name` in the calls of modules that led here: what a cache is not told, but they were given."""
    given, frame = {}, inspect.currentframe()
    while frame is not None:
        value = frame.f_locals.get(name)
        if isinstance(value, torch.Tensor) and isinstance(frame.f_locals.get("self"), torch.nn.Module):
            given[id(value)] = value
        frame = frame.f_back
    return list(given.values())


MOST_IN_A_CHUNK = 256  # tokens of a prompt, by default


def position_ceiling(window: Window, traits: ModelTraits, layers: list) -> int:
    """Below which the positions given to the model stay.

    It is far enough above the window that shifting back is rare, and above the reach of layers that slide by
    themselves, so that no key meets it twice. It is low enough that float32 is exact about angles, and never past the
    length that the model was trained on. A model that gets no positions has none.
    """
    if traits.ordered:
        return sys.maxsize
    ceiling = max(4 * window.length, 4096, *(getattr(layer, "sliding_window", 0) for layer in layers))
    return max(window.length, min(ceiling, traits.trained_length or ceiling))


class Stream:
    """The tokens of a batch in a bound cache, and what the model is given to take in more.

    Args:
        window: which tokens are kept.
        traits: of the model.

    Attributes:
        layers: one for each layer of the model.
        sink_layers: what of these is a `SinkLayer`.
        ceiling: positions given to the model stay below it; see `position_ceiling`.
        cycle: the length of the frames of keys in 8 bits (`CodedRing`); None for others.
        pads: `[rows]`, the columns of left padding.
        padding_known: whether a mask told them, or may have. Where the model was called by itself, whether it was seen
            that there is none.
        offsets: `[rows]`, by how much positions are lower than the counts of tokens, or `positions`. Keys follow before
            they are next used: see `follow_offsets`.
        positions: those of the tokens, maybe also of some to come; None if these are their numbers.
        transcript: what is known of their ids.
        media: the images or the like in the columns seen, and maybe in some after these.
        blocks: the columns of each run in which some saw later ones, first and end; only all of it can be taken back.
        ahead: which columns of the prompt that is going in see later ones; None if none do.
        axes: its first column, and the positions of all, `[axes, rows, length]`, where these are not numbers.
        plan: the latest update; None where nothing of it matters any more.
        compiled: what steps of compiled code are given; None where the next update is none.
    """

    def __init__(self, window: Window, traits: ModelTraits):
        self.window, self.traits = window, traits
        self._set_layers(make_layers(window, traits))
        self._set_ceiling(traits)
        self.pads, self.padding_known, self.offsets = [0], False, [0]
        self.transcript = Transcript()
        self.positions: Optional[Positions] = None
        self.media: list[SeenMedia] = []
        self.blocks: list[tuple[int, int]] = []
        self.ahead: Optional[Ahead] = None
        self.axes: Optional[tuple[int, torch.Tensor]] = None
        self.plan: Optional[UpdatePlan] = None
        self.compiled: Optional[CompiledSteps] = None

    def _set_ceiling(self, traits: ModelTraits) -> None:
        """Have these `traits`, and the bounds of positions that follow from them."""
        ceiling = position_ceiling(self.window, traits, self.layers)
        # Below the ceiling there is room for updates that begin late in a cycle.
        cycle = max(ceiling - MOST_IN_A_CHUNK, (ceiling + 1) // 2) if self.window.bits else None
        vars(self).update(traits=traits, ceiling=ceiling, cycle=cycle)

    def _set_layers(self, layers: list) -> None:
        """Have these `layers`."""
        vars(self).update(layers=layers, sink_layers=[sinks for layer in layers for sinks in layer.with_sinks()])

    def renewed(self) -> "Stream":
        """The same before its first token."""
        return Stream(self.window, self.traits)

    def rebind(self, traits: ModelTraits) -> None:
        """Go on with what was read of the model anew."""
        for layer, rotations in zip(self.layers, traits.rotations):
            layer.set_rotations(*rotations)
        self._set_ceiling(traits)

    @property
    def rings(self) -> list[Ring]:
        """What the sink layers keep their tokens in."""
        return list(dict.fromkeys(layer.ring for layer in self.sink_layers))

    @property
    def can_undo(self) -> bool:
        """Whether every layer can take an update back, also one that was cut short."""
        return all(layer.can_undo for layer in self.layers)

    @property
    def seen(self) -> int:
        """The columns that all layers have seen."""
        return min(layer.seen for layer in self.sink_layers)

    def seq_length(self, layer_idx: int) -> int:
        """The columns that a layer has seen; or what a model is told while it is at work, `UpdatePlan.place`."""
        if layer_idx >= len(self.layers):
            return 0
        layer = self._counting_layer(layer_idx)
        if layer.follows_plan and self.counts_places and self.sink_layers[-1].seen == self.plan.start:
            return self.plan.place
        # Without an index it is a user who asks, perhaps after an update that only some of the layers made.
        return self.seen if layer_idx == 0 else layer.get_seq_length()

    @property
    def is_indexed(self) -> bool:
        """Whether some layers choose their tokens by an index."""
        return any(layer.is_indexed for layer in self.layers)

    @property
    def counts_places(self) -> bool:
        """Whether the model was prepared for an update in which it is told places, and not columns."""
        return self.plan is not None and self.plan.is_prepared and self.traits.counts_places

    def _counting_layer(self, layer_idx: int) -> Any:
        """The layer `layer_idx`, or the first that counts columns if this one does not."""
        layer = self.layers[layer_idx]
        return layer if layer.counts_columns else next(other for other in self.layers if other.counts_columns)

    def mask_sizes(self, sizes: Union[torch.Tensor, int], layer_idx: int) -> tuple[int, int]:
        """See `SinkCache.get_mask_sizes`."""
        layer = self._counting_layer(layer_idx)
        if not layer.follows_plan:
            return layer.get_mask_sizes(sizes)
        plan = self.plan_update(layer.seen, query_length(sizes))
        # The masks that models make by themselves would fail on such columns, before any keys are asked for.
        if self.traits.ordered or plan.sees_copies:
            self._refuse_unprepared(plan, self.batch_size)
        end = plan.place + plan.length if self.counts_places else plan.end
        return plan.num_keys, end - plan.num_keys

    @property
    def keys(self) -> list[Optional[torch.Tensor]]:
        """`[batch, kv_heads, window.length, head_dim]` of each sink layer, by slots; and what the others have."""
        return self._numbers("keys")

    @property
    def values(self) -> list[Optional[torch.Tensor]]:
        """The same of values."""
        return self._numbers("values")

    def _numbers(self, name: str) -> list[Optional[torch.Tensor]]:
        """What the layers have by this name, after their latest update."""
        plan = self._new_plan(max(self.seen - 1, 0), 1)
        return [layer.numbers(plan).get(name) for layer in self.layers]

    @property
    def batch_size(self) -> int:
        """The rows of the batch, -1 if nothing was seen yet."""
        keys = (layer.tensors().get("keys") for layer in self.layers)
        return next((len(each) for each in keys if each is not None and each.numel() > 0), -1)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that hold something of a token."""
        return list({id(tensor): tensor for layer in self.layers for tensor in layer.memory()}.values())

    @torch.inference_mode(False)
    def copied(self, on_cpu: bool = False) -> "Stream":
        """A copy of its own memory, without a transcript: where the model's layers are, or on the CPU."""
        memo: dict[int, Any] = {}  # what deepcopy finds here it takes instead of a copy of its own
        for layer, layout in zip(self.layers, self.traits.layouts):
            device = torch.device("cpu") if on_cpu or not layout else layout[0][-1]
            for tensor in layer.memory():
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().to(device, copy=True)
        copied = copy.deepcopy(self, memo)
        copied.transcript, copied.plan, copied.compiled = Transcript(), None, None
        return copied

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict) -> "Stream":
        for tensor in self.tensors():  # a tensor with a graph has no copy of its own accord
            memo.setdefault(id(tensor), tensor.detach().clone())
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.leave()  # no model is at work on it
        return copied

    # What the model is given for an update

    def begin(self, batch_size: int, pads: list[int]) -> None:
        """Take over the padding of a batch before its first token; raise if later ones are of another batch."""
        if self.seen == 0:
            vars(self).update(pads=pads, offsets=[0] * len(pads), positions=None, media=[], blocks=[], plan=None)
        elif self.batch_size != batch_size:
            raise ValueError(
                f"`{CACHE}` holds a batch of {self.batch_size}, got one of {batch_size} (beams and returned "
                "sequences count). Continue with as many, or `batch_repeat_interleave` it."
            )
        elif self.pads not in (pads, pads * batch_size):
            raise ValueError(
                f"`attention_mask` has {pads} columns of left padding, but the rows in `{CACHE}` began after "
                f"{self.pads}. Pass the conversation as it was, with its mask, and the new tokens after it."
            )
        self.padding_known = True

    def plan_update(self, start: int, length: int) -> UpdatePlan:
        """The plan of `length` new columns after `start`. The first layer that asks makes it, for all of them."""
        if self.plan is None or (self.plan.start, self.plan.length) != (start, length):
            sees_until = None if self.ahead is None else self.ahead.in_columns(start, length)
            self.plan = self._new_plan(start, length, sees_until)
        return self.plan

    def _new_plan(self, start: int, length: int, sees_until: Optional[dict] = None) -> UpdatePlan:
        return UpdatePlan(
            self.window, start, length, self.pads, self.offsets, self.positions, sees_until, cycle=self.cycle
        )

    def most_at_once(self, start: int) -> int:
        """How many columns after `start` one forward pass can take."""
        if start > 0 and not self.traits.continues_states:
            return 1
        return self.ceiling - min(start, self.window.num_sinks)

    def natural_positions(self, length: int, start: Optional[int] = None) -> torch.Tensor:
        """The positions of `length` columns from `start` on, by default the next ones. They are negative for padding.

        Returns:
            int64 `[rows, length]` on the CPU; or `[axes, rows, length]` in a prompt where they differ by axis.
        """
        start = self.seen if start is None else start
        columns = torch.arange(start, start + length, dtype=torch.long, device="cpu")
        if self.axes is not None and start + length <= self.axes[0] + self.axes[1].shape[-1]:
            return self.axes[1][..., start - self.axes[0] :][..., :length]
        if self.positions is not None:
            return self.positions.of(columns[None])
        return columns - torch.tensor(self.pads, dtype=torch.long, device="cpu")[:, None]

    def place(self, positions: torch.Tensor) -> None:
        """Have the next columns, which are those of a prompt, at `positions`, int64 `[axes, rows, length]`, no numbers.

        Rows of which each has positions of its own are counted one by one, as rows with padding of their own are.
        """
        if (positions == positions[:, :1]).all():
            positions = positions[:, :1]
        known = self.positions or Positions.of_numbers(max(self.seen, 1), self.pads)
        known, start = known.followed_by(self.seen, positions), self.seen
        rows = len(known.least)
        if len(self.pads) < rows:
            vars(self).update(pads=self.pads * rows, offsets=self.offsets * rows)
        vars(self).update(positions=known, axes=(start, positions), plan=None)

    def lower_positions_if_needed(self, length: int) -> None:
        """Before `length` new tokens would reach the ceiling, shift all kept keys back to before position 0.

        That costs O(window length) once in about `ceiling` tokens, and each key meets it at most once before it leaves
        the window. Keys may lie at negative positions: the model is given those of the new tokens only.
        """
        plan = self.plan_update(self.seen, length)
        nexts, ends = plan.seen, [seen + new for seen, new in zip(plan.seen, plan.num_new)]
        if self.positions is not None and plan.start > 0:
            nexts, ends = self.positions.after(plan.start), self.positions.after(plan.end)
        offsets = [
            self._offset(next_one, end, offset) if seen >= self.window.num_sinks else offset
            for seen, next_one, end, offset in zip(plan.seen, nexts, ends, self.offsets)
        ]
        if offsets != self.offsets:
            vars(self).update(offsets=offsets, plan=None)

    def _offset(self, start: int, end: int, offset: int) -> int:
        """By how much the positions of a row are lowered for tokens at `start` to `end`; `offset` if that will do.

        Keys in 8 bits cost least to read where that is a multiple of the cycle, and nothing to lower.
        """
        if self.cycle is not None:
            multiple = start - start % self.cycle
            return multiple if end - multiple <= self.ceiling else start
        return start if end - offset > self.ceiling else offset

    def follow_offsets(self) -> None:
        """Have all keys lowered by `offsets`. What was cut short before is finished."""
        for layer in self.layers:
            layer.lower_positions(self.offsets)

    # An update

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SinkCache.update`; `args` and `kwargs` are for layers of transformers' own."""
        layer = self.layers[layer_idx]
        if self.compiled is not None:
            return layer.write_compiled(key_states, value_states)
        if not layer.follows_plan:
            return layer.update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._update_untraced(layer, key_states, value_states)
        return self._update(layer, key_states, value_states)

    def _update(
        self, layer: SinkLayer, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update a sink layer with new keys and values, `[batch, kv_heads, length, head_dim]`."""
        plan = self.plan_update(layer.seen, key_states.shape[2])
        if not plan.is_prepared:
            self._refuse_unprepared(plan, key_states.shape[0])
            self.transcript = self.transcript.up_to(plan.start)  # nobody says what these ids are
        keys, values = layer.update(key_states.detach(), value_states.detach(), plan)
        if not torch.is_grad_enabled():
            return keys, values
        # A graph would keep the slots themselves, which the next update writes into.
        if key_states.requires_grad or value_states.requires_grad:
            return WithoutGraph.apply(keys, values, key_states, value_states)
        return keys.clone(), values.clone()

    def update_indexer(self, key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """See `SinkCache.update_indexer`."""
        layer = self.layers[layer_idx]
        plan = self.plan_update(layer.indexer.seen, key_states.shape[1])
        self._refuse_unprepared(plan, len(key_states))
        return layer.update_indexer(key_states, plan)

    # Its numbers are other ones at each step. In code that the user compiled it stays uncompiled.
    _update_untraced = torch.compiler.disable(_update)

    def _refuse_unprepared(self, plan: UpdatePlan, batch_size: int) -> None:
        """Raise if the model was not prepared, and the mask or positions that it makes by itself can't be right."""
        if plan.caller is not Caller.UNKNOWN:
            return
        trained = self.traits.trained_length
        if self._is_torn(plan):
            reason = "it was left in the middle of a forward pass by an error"
        elif plan.start > 0 and batch_size != self.batch_size:
            reason = (
                f"it holds a batch of {self.batch_size}, got one of {batch_size}: `batch_repeat_interleave` it first"
            )
        elif any(self.pads) or any(self.offsets) or self.positions is not None:
            reason = "its rows were padded, or their positions shifted back, so the model's own count of them is off"
        elif self.traits.ordered:
            if not plan.evicts:
                plan.caller = Caller.MODEL
                return
            reason = "the model knows the order of tokens by columns, and counts one for each that was evicted too"
        elif plan.start > 0 and not self.traits.continues_positions:
            reason = "the model would start over from position 0"
        elif plan.end > (self.ceiling if trained is None else trained):
            reason = f"the model would count positions past the {trained or self.ceiling} that it was trained on"
        elif plan.length > 1 and plan.start > 0 and not self.traits.continues_states:
            reason = "the model forgets its states where it gets several tokens at once, so pass one at a time"
        elif plan.sees_copies:
            reason = f"these {plan.length} tokens evict some, and each has to see another part of the window"
        elif self._is_given_others(plan, batch_size):
            reason = (
                "the model was given padding, or positions that are not the numbers of tokens, as those of an image in "
                "two dimensions or by `rope_deltas` that it keeps of another conversation"
            )
        elif plan.evicts and batch_size > 1 and not self.padding_known:
            reason = f"some of these {batch_size} rows may be padded, and then not all evict the same"
        else:
            plan.caller = Caller.MODEL
            return
        raise ValueError(
            f"A `SinkCache` can't go on outside of its `generate`: {reason}. Use `generate`, or call the model with "
            f"`**{CACHE}.prepare_inputs(input_ids, attention_mask)`."
        )

    def _is_given_others(self, plan: UpdatePlan, batch_size: int) -> bool:
        """Whether the model was given other positions than the numbers of columns, or a padded row alone.

        The positions of several rows may be those of padding, until they evict. Whether they are is found at the start.
        """
        numbers = torch.arange(plan.start, plan.end, dtype=torch.long, device="cpu")
        positions = [given.cpu() for given in given_above("position_ids") if given.shape[-1] == plan.length]
        numbered = all((given == numbers).all() for given in positions)
        if plan.start == 0:
            padded = any(mask.dim() == 2 and not mask.all() for mask in given_above("attention_mask"))
            self.padding_known = len(positions) > 0 and numbered and not padded
            if batch_size == 1 and padded:
                return True
        if batch_size == 1 or self.padding_known:
            return not numbered
        return any(given.dim() == 3 and (given != given[:1]).any() for given in positions)

    def _is_torn(self, plan: UpdatePlan) -> bool:
        """Whether an update before the one of `plan`, which has come to the first sink layer at most, was cut short."""
        first = next(index for index, layer in enumerate(self.layers) if layer.follows_plan)
        return any(
            layer.progress() - ({plan.start, plan.end} if index < first else {plan.start})
            for index, layer in enumerate(self.layers)
        )

    def finish_update(self) -> None:
        """After the model's forward pass: count the token that compiled code wrote, and drop the plan."""
        if self.compiled is not None:
            for layer in self.layers:
                layer.seen = self.plan.end
        self.plan = None

    def leave(self) -> None:
        """At the end of a call, whatever ended it: nothing that follows belongs to its last update."""
        self.compiled = self.ahead = self.axes = None
        if self._shows_progress:
            self.plan = None

    @property
    def _shows_progress(self) -> bool:
        """Whether the layers tell of an update that was cut short. Recurrent states don't: kernels change them."""
        return all(layer.shows_progress for layer in self.layers)

    @torch.inference_mode(False)
    def with_rows(self, indices: torch.Tensor) -> "Stream":
        """The stream of a batch whose row `i` is row `indices[i]` here."""
        self.follow_offsets()
        rings = {ring: ring.with_rows(indices) for ring in self.rings}
        stream = shared(self)
        stream._set_layers([layer.with_rows(indices, rings) for layer in self.layers])
        stream.transcript, stream.plan, stream.compiled = self.transcript.with_rows(indices), None, None
        stream.media = [media.with_rows(indices) for media in self.media]
        stream.positions = None if self.positions is None else self.positions.with_rows(indices)
        stream.pads = numbers_of_rows(self.pads, indices)
        stream.offsets = numbers_of_rows(self.offsets, indices)
        return stream

    # Taking back

    def settle(self) -> None:
        """Finish or take back what was cut short by an error or an interrupt.

        Raises:
            ValueError: layers that slide, or keep a state, were cut short: they can't take tokens back.
        """
        self.ahead = self.axes = None  # those of a prompt that is no longer going in
        self.follow_offsets()
        progress, plan = {columns for layer in self.layers for columns in layer.progress()}, self.plan
        if len(progress) > 1 and self.can_undo:
            self.take_back(min(progress))
            return
        unknown = plan is not None and plan.is_prepared and not self._shows_progress
        if len(progress) > 1 or (unknown and (plan.caller is Caller.GENERATE or progress != {plan.end})):
            raise ValueError(
                f"The `SinkCache` in `{CACHE}` was left in the middle of a forward pass by an error: its layers "
                "disagree about the tokens seen, and those that slide or keep a state can't take them back. `reset()` "
                "it, or use a new one."
            )
        self._forget_from(self.seen)

    @property
    def record_past(self) -> bool:
        """Whether what tokens evict is kept until some are taken back, over several updates too."""
        return any(layer.record_past for layer in self.sink_layers)

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        for layer in {*self.layers, *self.sink_layers}:
            if layer.can_record:
                layer.record_past = recording

    @property
    def can_take_back(self) -> bool:
        """Whether all layers can forget their latest tokens."""
        return all(layer.can_undo or (layer.can_record and layer.record_past) for layer in self.layers)

    @property
    def has_evicted(self) -> bool:
        """Whether a row has more tokens than the window keeps."""
        return self.seen - min(self.pads) > self.window.length

    @property
    def num_removable(self) -> int:
        """How many of the latest columns `take_back` can forget."""
        if not self.can_take_back:
            return 0
        if not any(self.offsets) and not self.has_evicted:
            return self.seen
        return min(layer.undo.columns for layer in self.sink_layers)

    def can_end_at(self, end: int) -> bool:
        """Whether `take_back` can forget all columns from `end` on, and a token of each row stays."""
        return max(self.pads) < end and self.seen - self.num_removable <= end == self.latest_end(end)

    def latest_end(self, column: int) -> int:
        """The latest column up to `column` that is in no run of columns of which some saw later ones."""
        return min((start for start, end in self.blocks if start < column < end), default=column)

    def take_back(self, end: int) -> None:
        """Forget all columns from `end` on, of which `num_removable` tells how many may be."""
        for layer in self.layers:
            layer.take_back(end, self.pads)
        self._forget_from(end)

    def _forget_from(self, end: int) -> None:
        """Forget what is known of the columns from `end` on, which the layers have not seen."""
        self.transcript = self.transcript.up_to(end)
        self.media = [media for media in self.media if media.start < end]
        self.blocks = [block for block in self.blocks if block[0] < end]
        if self.positions is not None and end < self.positions.end:
            self.positions = self.positions.up_to(end)
        self.plan = None

    # The conversation

    def common_length(self, input_ids: torch.Tensor, first: int = 0) -> int:
        """Up to which column `input_ids` (`[batch, length]`, from column `first` on) are what was seen, if known."""
        return self.transcript.common_length(input_ids, first, self.seen, self.pads)

    def trim_transcript(self) -> None:
        """Forget ids of columns not seen, and keep but a digest of those that can't be taken back any more.

        What else is known of these columns, as the positions of those that have left the window, goes too.
        """
        first = 0
        if self.has_evicted:  # else all can be
            # An update that was cut short is yet to be taken back: in the layers that it reached.
            removable = max(layer.undo.columns for layer in self.sink_layers)
            first = self.seen - max(removable, self.window.length)
        self.transcript = self.transcript.up_to(self.seen).digested_before(first, self.pads)
        self.blocks = [block for block in self.blocks if block[1] > first]
        if self.positions is not None:
            self.positions = self.positions.from_column(first - self.window.length, self.window, self.pads)

    def refuse_other_ids(self, input_ids: torch.Tensor, end: int) -> None:
        """Raise if `input_ids`, which end before column `end`, differ from what is known of the tokens seen."""
        if self.common_length(input_ids, end - input_ids.shape[1]) < self.seen:
            raise ValueError(
                f"`input_ids` must continue the conversation in `{CACHE}`, but are not the tokens that the "
                "`SinkCache` has seen. To start another one, `reset()` it."
            )

    def end_of_common_media(self, media: list[SeenMedia], start: int = 0) -> float:
        """The column up to which the images or the like of a conversation are those known here; no end if all are.

        Args:
            media: those in its columns from `start` on.
        """
        known = [each for each in self.media if each.start >= start]
        for one, other in itertools.zip_longest(known, media):
            if one is None or other is None or not one.is_like(other, self.traits.rounding):
                return min(each.start for each in (one, other) if each is not None)
        return math.inf

    def refuse_other_media(self, media: list[SeenMedia], start: int) -> None:
        """Raise if the images or the like in a conversation, passed from column `start` on, are not those seen."""
        if self.end_of_common_media(media, start) < self.seen:
            raise ValueError(
                "Images or the like of the conversation, passed again with its tokens, are not those that the "
                f"`SinkCache` in `{CACHE}` was given before. `reset()` it to start another conversation."
            )

    def end_in_common(self, kwargs: dict[str, Any]) -> int:
        """After which of the columns seen the conversation in the arguments of `generate` goes on.

        That may be before the last one. An interrupt, or a draft that was not accepted, may have left tokens here that
        are not in the conversation, and one of its tokens at least must be new. What can't be taken back counts as
        common, and is refused later as other tokens.

        Raises:
            ValueError: what is passed of the conversation does not go on from what was seen.
        """
        columns, columns_not_passed, _ = prompt_columns(kwargs)
        ids, seen = prompt_ids(kwargs), self.seen
        end = seen
        if seen > 0 and ids is not None:
            common = self.latest_end(min(self.common_length(ids, columns_not_passed), columns - 1))
            if common < seen and self.can_end_at(common):
                end = common
        refuse_gap(kwargs, seen, end)
        return end


# ---------------------------------------------------------------------------------------------------------------------
# What the model is given for an update of a stream: positions that stay bounded, and masks over what is kept
# ---------------------------------------------------------------------------------------------------------------------


def inputs_for_step(
    stream: Stream, model: PreTrainedModel, inputs: dict[str, Any], caller: Caller, compiled: bool = False
) -> dict[str, Any]:
    """Fit the model's inputs for one update: positions that stay bounded, and a mask over the kept keys.

    Args:
        compiled: whether compiled code will make it, of a single token.
    """
    tokens = new_tokens(inputs)
    stream.compiled = (stream.compiled or CompiledSteps()) if compiled else None
    stream.lower_positions_if_needed(tokens.shape[1])
    stream.follow_offsets()
    plan = stream.plan_update(stream.seen, tokens.shape[1])
    if stream.traits.ordered:
        return _inputs_in_order(stream, inputs, plan, tokens, caller)
    plan.caller = caller
    positions = inputs.get("position_ids") if stream.positions is None else None
    if positions is None:
        positions = stream.natural_positions(plan.length).clamp(min=0).to(tokens.device)
    if any(stream.offsets):
        positions = positions - torch.tensor(stream.offsets, dtype=torch.long, device=positions.device)[:, None]
    if compiled:
        # Strides that depend on how many tokens there were would have the code compiled again.
        positions = positions.clone(memory_format=torch.contiguous_format)
        stream.compiled.prepare(plan, stream.sink_layers, stream.traits.mask_dtype, tokens.device)
        inputs["attention_mask"] = stream.compiled.mask
    elif _replaces_mask(stream, plan):
        inputs["attention_mask"] = _masks(stream, model, plan, tokens)
    elif getattr(inputs.get("attention_mask"), "ndim", 0) == 2:  # of all of a prompt, which goes in by chunks
        inputs["attention_mask"] = inputs["attention_mask"][:, : plan.end]
    mask = inputs.get("attention_mask")
    if stream.traits.inverts_masks and mask is not None and mask.dim() == 4:
        inputs["attention_mask"] = (mask == 0).to(mask.dtype)
    if inputs.get("output_router_logits", stream.traits.balances_experts):
        inputs["output_router_logits"] = False  # their loss takes a mask of padding only, and none over kept keys
    if TELLS_COLUMNS and stream.counts_places:
        set_columns(inputs, plan.place, plan.place + plan.length, tokens.device)
    return inputs | {"position_ids": positions}


def _inputs_in_order(
    stream: Stream, inputs: dict[str, Any], plan: UpdatePlan, tokens: torch.Tensor, caller: Caller
) -> dict[str, Any]:
    """The same for a model that goes by the columns of its cache: no positions, and a mask of padding in these."""
    if plan.sees_copies:
        raise ValueError(
            f"These {plan.length} tokens evict some, and the model knows the order of tokens by the columns of its "
            "cache, which are others for each of them. Pass one token at a time."
        )
    plan.caller = caller
    inputs = {name: value for name, value in inputs.items() if name not in ("position_ids", "cache_position")}
    return inputs | {"attention_mask": plan.mask_in_order(len(tokens), tokens.device)}


def _replaces_mask(stream: Stream, plan: UpdatePlan) -> bool:
    """Whether the model is given a mask for an update, in place of the one that it makes by itself."""
    return any(stream.pads) or plan.evicts or stream.is_indexed or bool(plan.sees_until)


def _masks(stream: Stream, model: PreTrainedModel, plan: UpdatePlan, tokens: torch.Tensor) -> Any:
    """The mask over the kept keys and the new `tokens` (`[batch, length, ...]`), or one for each kind of layer.

    None where each token sees all old keys and, causally, the new ones. An index gets one there too: until 5.16
    models make it of positions, which don't tell where keys are, or add a mask of booleans.
    """
    if plan.needs_mask and not takes_masks(model):
        raise ValueError(
            "`attention_mask` has padding, which needs a mask over the kept tokens that this model's "
            '`attn_implementation`, flash attention, does not take. Load the model with "sdpa".'
            if not plan.sees_copies
            else f"These {plan.length} tokens evict some, which needs a mask that this model's "
            "`attn_implementation`, flash attention, does not take. Pass one token at a time, or load the model "
            'with "sdpa".'
        )
    mask = None
    one_count = not COUNTS_BY_LAYER and stream.counts_places and plan.place != plan.start
    by_kind = any(layer.has_kind for layer in stream.layers) and (
        any(stream.pads) or plan.sees_copies or one_count or stream.is_indexed or bool(plan.sees_until)
    )
    # Given masks by kind a model makes none by itself, and before 4.54 it makes a wrong one.
    leaves_it = (by_kind and plan.length > 1) or not MASKS_FOLLOW_THE_CACHE
    if plan.needs_mask or stream.is_indexed or (leaves_it and takes_masks(model)):
        mask = plan.mask(stream.traits.mask_dtype, tokens.device)
    if not by_kind:
        return mask
    # A state's mask is one of padding. transformers leaves it out where a token comes alone, padding or not.
    of_states = None
    if plan.start < max(stream.pads):
        of_states = (plan.tokens(0, tokens.device) >= 0).expand(len(tokens), -1)
    masks = {"full_attention": mask, "hybrid": mask, "linear_attention": of_states, "conv": of_states}
    for kind, layer in zip(layer_kinds(model.config), stream.layers):
        if kind not in masks and layer.follows_plan:
            masks[kind] = mask
        elif kind not in masks and kind in ("sliding_attention", "chunked_attention"):
            masks[kind] = _local_mask(stream, model, kind, layer, plan, tokens)
    return masks


def _local_mask(
    stream: Stream, model: PreTrainedModel, kind: str, layer: UntouchedLayer, plan: UpdatePlan, tokens: torch.Tensor
) -> Optional[torch.Tensor]:
    """The mask of a `layer` of transformers' own, of a `kind` that slides or attends by chunks.

    None where a new token sees all keys. However many columns were seen, it takes as long.
    """
    num_keys = num_keys_of(layer, plan.length)
    padded = plan.end - num_keys < max(stream.pads)
    if not takes_masks(model):  # flash attention slides by itself, and takes a mask of padding
        return (plan.tokens(plan.length - num_keys, tokens.device) >= 0).expand(len(tokens), -1) if padded else None
    if plan.length == 1 and not padded and kind != "chunked_attention":
        return None
    return plan.local_mask(kind, layer.sliding_window, num_keys, stream.traits.mask_dtype, tokens.device)


# ---------------------------------------------------------------------------------------------------------------------
# The class of transformers<4.53, for code that drives it by hand
# ---------------------------------------------------------------------------------------------------------------------


class UnboundLayers:
    """The tokens of an unbound `SinkCache`: what the class of transformers<4.53 did, bit for bit.

    That includes its faults (huggingface/transformers #31581, #33691, #35350): it rotates all keys but the sinks at
    each step, in their own dtype, and starts when nothing is evicted yet. Keys have positions in the window, but
    `generate` gives queries their positions in the whole sequence.

    Attributes:
        keys, values: of each layer, in order of the sequence: `[batch, kv_heads, tokens kept, head_dim]`.
        seen: how many tokens came.
    """

    def __init__(self, window: Window):
        self.window, self.layers, self.seen = window, [], 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._angles: Optional[torch.Tensor] = None  # cos and sin of the window's positions, [2, positions, rotary_dim]
        self._back: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def renewed(self) -> "UnboundLayers":
        """The same before its first token."""
        return UnboundLayers(self.window)

    def seq_length(self, layer_idx: int) -> int:
        """The number of tokens that a layer stores."""
        return self.keys[layer_idx].shape[-2] if layer_idx < len(self.keys) else 0

    def mask_sizes(self, sizes: Union[torch.Tensor, int], layer_idx: int) -> tuple[int, int]:
        """See `SinkCache.get_mask_sizes`."""
        stored, length = self.seq_length(layer_idx), query_length(sizes)
        return (min(stored + length, self.window.length) if stored else length), 0

    @property
    def batch_size(self) -> int:
        """The rows of the batch, -1 if nothing is stored yet."""
        return len(self.keys[0]) if self.keys else -1

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that hold something of a token."""
        return self.keys + self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, cache_kwargs: Any, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SinkCache.update`."""
        if self.window.bits is not None:
            raise ValueError(
                f"`kv_bits` is {self.window.bits}, which a `SinkCache` has only if it is bound to the model: "
                "`cache.bind(model)`. Unbound it is the class of transformers<4.53, which knows no bits."
            )
        cache_kwargs = cache_kwargs or {}
        cos, sin, window = cache_kwargs.get("cos"), cache_kwargs.get("sin"), self.window
        if layer_idx == 0 and cos is not None and sin is not None:
            self._remember_angles(cos, sin)
        length = key_states.shape[-2]
        self.seen += length if layer_idx == 0 else 0
        if layer_idx >= len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
            return key_states, value_states
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        total = keys.shape[-2] + length
        if total >= window.length:
            sinks, recent = slice(0, window.num_sinks), slice(window.num_sinks + length - window.length, None)
            recent_keys = keys[:, :, recent]
            if cos is not None and sin is not None:
                recent_keys = self._move_back(recent_keys, length, key_states.dtype, cache_kwargs)
            elif total > window.length:
                raise ValueError(
                    f"The `SinkCache` must evict ({total} tokens, `window_length` {window.length}) and was given no "
                    "`sin` and `cos` to move its keys with. Bind it to the model first: `cache.bind(model)`."
                )
            keys = torch.cat([keys[:, :, sinks], recent_keys], dim=-2)
            values = torch.cat([values[:, :, sinks], values[:, :, recent]], dim=-2)
        self.keys[layer_idx] = torch.cat([keys, key_states], dim=-2)
        self.values[layer_idx] = torch.cat([values, value_states], dim=-2)
        return self.keys[layer_idx], self.values[layer_idx]

    def _remember_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Collect cos and sin of the window's positions.

        They are `[1, length, rotary_dim]` for new tokens, or `[positions, rotary_dim]`, a table for the whole window.
        """
        angles = torch.stack([cos, sin] if cos.dim() == 2 else [cos[0], sin[0]])
        if cos.dim() == 2 or self._angles is None:
            self._angles = angles
        elif self._angles.shape[1] < self.window.length:
            self._angles = torch.cat([self._angles, angles], dim=1)

    def _move_back(self, keys: torch.Tensor, length: int, dtype: torch.dtype, cache_kwargs: dict) -> torch.Tensor:
        """`keys`, `[batch, kv_heads, kept, head_dim]`, rotated back by `length` positions; `dtype` is of the angles."""
        if length not in self._back:
            cos, sin = self._angles[:, : self.window.length].float()
            here, there = slice(self.window.num_sinks + length, None), slice(self.window.num_sinks, -length)
            self._back[length] = (
                (cos[here] * cos[there] + sin[here] * sin[there]).to(dtype)[None],
                (-sin[here] * cos[there] + cos[here] * sin[there]).to(dtype)[None],
            )
        cos, sin = self._back[length]
        rotary_dim = cache_kwargs.get("partial_rotation_size")
        rotating, still = (keys, None) if rotary_dim is None else (keys[..., :rotary_dim], keys[..., rotary_dim:])
        half = rotating.shape[-1] // 2
        swapped = torch.cat([-rotating[..., half:], rotating[..., :half]], dim=-1)
        rotated = (rotating * cos) + (swapped * sin)
        return rotated if still is None else torch.cat([rotated, still], dim=-1)

    def with_rows(self, indices: torch.Tensor) -> "UnboundLayers":
        """A copy whose row `i` of the batch is row `indices[i]` here."""
        layers = shared(self)
        layers.keys = [keys.index_select(0, indices.to(keys.device)) for keys in self.keys]
        layers.values = [values.index_select(0, indices.to(values.device)) for values in self.values]
        return layers


# ---------------------------------------------------------------------------------------------------------------------
# The file of a conversation
# ---------------------------------------------------------------------------------------------------------------------

# It is a safetensors file with these tensors:
#
#     keys.0, values.0, ...     of the layers, by the names that the method `tensors` of a layer gives; what `CodedRing`
#                               has of them with 8 bits is in no file of versions before 4
#     frequencies.0, ...        by which the keys of the layers rotate
#     fingerprint               of the model
#     latest_ids, digest        of the transcript, as far as it has some; files of version 1 have no digest
#     least, largest, behind_sinks    of `Positions`, where a conversation has some
#     media                     the digests of images or the like; files of version 2 have neither these nor positions
#
# Its metadata has one entry, `sink_cache`: the state of the stream, a JSON object. The `checksum` in it covers the rest
# of the state and all tensors, so that any damage shows.
FORMAT_VERSION = 4

OTHER_MODEL = (
    "The `SinkCache` comes from a conversation with another model, whose keys and values mean nothing to this one. Use "
    "the model that it was held with."
)


def rotations_by_name(traits: ModelTraits) -> dict[str, Rotation]:
    """The rotations of the layers that have one, by the names that their frequencies have in a file."""
    own = [rotation for rotation, _ in traits.rotations]
    return {f"frequencies.{layer_idx}": each for layer_idx, each in enumerate(own) if each is not None}


def pack(stream: Stream) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file holds of `stream`: its state, with the checksum, and its tensors by name. All numbers are finite."""
    for ring in stream.rings:  # the sinks are stored as the model made them
        ring.place_sinks([0])
    stream.trim_transcript()
    transcript = stream.transcript
    tensors = {"fingerprint": stream.traits.fingerprint, "latest_ids": transcript.ids, "digest": transcript.digest}
    if stream.positions is not None:
        tensors |= {name: getattr(stream.positions, name) for name in ("least", "largest", "behind_sinks")}
    if stream.media:
        tensors["media"] = torch.stack([media.digest for media in stream.media])
    # Layers may share their frequencies, but safetensors takes no tensors that share memory.
    tensors |= {name: each.frequencies.clone() for name, each in rotations_by_name(stream.traits).items()}
    for layer_idx, layer in enumerate(stream.layers):
        tensors |= {f"{name}.{layer_idx}": tensor for name, tensor in layer.tensors().items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():  # `isfinite` alone would need memory as large as a tensor
        if tensor.numel() > 0 and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"The `SinkCache` can't be saved: its {name!r} holds numbers that are not finite.")
    state = {
        "version": FORMAT_VERSION,
        "window_length": stream.window.length,
        "num_sink_tokens": stream.window.num_sinks,
        "kv_bits": stream.window.bits,
        "seen": stream.seen,
        "pads": stream.pads,
        "padding_known": stream.padding_known,
        "offsets": stream.offsets,
        "latest_end": transcript.end,
        "digested": transcript.digested,
        "positions_start": None if stream.positions is None else stream.positions.start,
        "media": [[media.start, media.end] for media in stream.media],
        "blocks": stream.blocks,
    }
    return state | {"checksum": _checksum(state, tensors)}, tensors


@torch.inference_mode(False)
def unpack(stream: Stream, state: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Give a new `stream`, of the same window and of a model that fits, what `pack` returned of another.

    Tensors go to `device` first. The layers move them to where they belong.
    """
    stream.pads, stream.padding_known, stream.offsets = state["pads"], state["padding_known"], state["offsets"]
    ids = tensors.get("latest_ids")
    parts = () if ids is None else ((state["latest_end"] - ids.shape[1], ids),)
    stream.transcript = Transcript(state.get("digested", 0), tensors.get("digest"), parts)
    if state.get("positions_start") is not None:
        least, largest, behind_sinks = (tensors.get(name) for name in ("least", "largest", "behind_sinks"))
        stream.positions = Positions(state["positions_start"], least, largest, behind_sinks)
    stream.blocks = [(start, end) for start, end in state.get("blocks", [])]
    stream.media = [SeenMedia(*columns, tensors["media"][each]) for each, columns in enumerate(state.get("media", []))]
    for layer_idx, layer in enumerate(stream.layers):
        suffix = f".{layer_idx}"
        own = {name: tensor.to(device) for name, tensor in tensors.items() if name.endswith(suffix)}
        own = {name.removesuffix(suffix): tensor for name, tensor in own.items()}
        layer.restore(own, state["seen"], state["offsets"])


def _checksum(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of the tensors of a conversation and of its state, except the checksum in it."""
    fields = {name: value for name, value in state.items() if name != "checksum"}
    checksum = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def write_file(path: Union[str, os.PathLike], tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside `path`, then move it there; OSError if it can't be written.

    It takes over the mode of a file that was there, and its owner where that is allowed. safetensors itself writes over
    the old file, which a kill would lose. From 0.8 on it changes its mode, and replaces a symbolic link.
    """
    target = os.path.realpath(path)
    written = os.path.join(os.path.dirname(target), f".sink_cache-{secrets.token_hex(16)}")
    try:
        old = os.stat(target) if os.path.exists(target) else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if old is not None and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, "it is write-protected")
        with open(written, "xb") as file:  # made here to learn the mode of a new file
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode if old is None else old.st_mode)
        os.chmod(written, mode)  # before it holds what others may not read
        safetensors.torch.save_file(tensors, written, metadata)
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        if old is not None and hasattr(os, "chown"):
            for owner in ((old.st_uid, -1), (-1, old.st_gid)):
                with contextlib.suppress(OSError):  # not everyone may give files away
                    os.chown(written, *owner)
        os.chmod(written, mode)
        os.replace(written, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"`path` can't be written, got {os.fspath(path)!r}: {error}") from error
    finally:  # where it was not moved
        with contextlib.suppress(OSError):
            os.remove(written)


def read_file(path: Union[str, os.PathLike]) -> tuple[str, dict[str, torch.Tensor]]:
    """The state (JSON) and the tensors that `SinkCache.save` wrote to `path`; ValueError if that is no such file."""
    wanted = f"`path` must be a file that `SinkCache.save` wrote, got {os.fspath(path)!r}"
    with telling(lambda error: ValueError(f"{wanted}: {error}")):  # also of a torch that doesn't know a dtype
        # By hand, because safetensors opens a file several times, and `save` may replace it in between.
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 10**8 else None  # by the format of safetensors
            if not isinstance(header, dict) or "sink_cache" not in header.get("__metadata__", {}):
                raise ValueError("its metadata has no entry `sink_cache`")
            file.seek(0)
            return header["__metadata__"]["sink_cache"], safetensors.torch.load(file.read())


def checked_state(text: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state in the metadata of a file, which is `text`.

    It raises ValueError if that or the `tensors` are not as they were written, or their format is not known here.
    """
    try:
        state = json.loads(text)
        version = state.get("version")
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"its metadata is no state of a `SinkCache`: {error}") from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"its format has version {version}, and those from 1 to {FORMAT_VERSION} are known here. Load it with the "
            "`SinkCache` that wrote it, or a later one"
        )
    if state.get("checksum") != _checksum(state, tensors):
        raise ValueError("something in it was changed after it was written: its checksum is another")
    return state


def refuse_other_model(tensors: dict[str, torch.Tensor], traits: ModelTraits, fingerprint: torch.Tensor) -> None:
    """Raise a ValueError unless the `tensors` of a file come from a model with these traits and this fingerprint."""
    rotations = rotations_by_name(traits)
    held = {name: replace(each, frequencies=tensors.get(name, each.frequencies)) for name, each in rotations.items()}
    same = rotate_alike(held, rotations) and are_alike(fingerprint, tensors["fingerprint"])
    if not same or any(name.startswith("frequencies.") and name not in rotations for name in tensors):
        raise ValueError(OTHER_MODEL)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations kept between calls of `generate`
# ---------------------------------------------------------------------------------------------------------------------

# How many tokens a chat template may put before an answer, such as an empty thought, and leave out in later turns.
ANSWER_PREFIX = 16


def basis(model: PreTrainedModel, stream: Stream) -> tuple:
    """Everything besides the tokens that the keys and values of a `stream` of `model` depend on. Reuse needs it equal.

    The list of rotations stands for the model's modules, settings and adapters: it is the same object as long as these
    stay the same. The stream keeps it alive, so that no other can have its `id`. Hooks count because they may change
    keys and values. A hook that begins to do something else without being exchanged isn't noticed.
    """
    device = input_device(model).type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torchs = torch.nn.modules.module
    hooks = known_hooks(torchs._global_forward_pre_hooks, torchs._global_forward_hooks)
    modules = modules_of(model)
    for number, module in enumerate(modules):
        if module._forward_pre_hooks or module._forward_hooks:
            hooks += [(number, *hook) for hook in known_hooks(module._forward_pre_hooks, module._forward_hooks)]
    return stream.window, id(stream.traits.rotations), some_numbers(modules), autocast, hooks


@dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation that is kept.

    Args:
        ids: of all columns seen, int32 `[batch, columns]` on the CPU.
        basis: see the function of that name.
        snapshots: its stream after the latest prompt and after the answer, in this order, or one of these. They never
            change, because calls go on in copies of them.
    """

    ids: torch.Tensor
    basis: tuple
    snapshots: list[Stream]

    def common_length(self, ids: torch.Tensor) -> int:
        """How many of the first columns of `ids`, int32 `[batch, length]`, are the same in this conversation."""
        length = min(ids.shape[1], self.ids.shape[1])
        return first_difference(ids[:, :length], self.ids[:, :length])


class KeptConversations:
    """The conversations kept on one model, the least recently used first."""

    def __init__(self):
        self.conversations: list[Conversation] = []
        self.changing = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that their tensors take. Two conversations may share a snapshot, which counts once."""
        tensors = [conversation.ids for conversation in self.conversations]
        streams = {id(stream): stream for conversation in self.conversations for stream in conversation.snapshots}
        tensors += [tensor for stream in streams.values() for tensor in stream.tensors()]
        return sum(tensor.nbytes for tensor in tensors)


def all_kept() -> "weakref.WeakKeyDictionary[PreTrainedModel, dict[type, KeptConversations]]":
    """For each model, what every copy of this file keeps on it, by the copy's `KeptConversations`.

    This file may be loaded several times in a process, from the Hub and as an installed package. Each copy is a module
    with classes of its own, maybe of another version. It goes on in its own conversations only, but can count the bytes
    of all, and forget them. None outlives its model.
    """
    name = "_sink_cache_kept_conversations"
    module = sys.modules.setdefault(name, types.ModuleType(name))
    return vars(module).setdefault("of_models", weakref.WeakKeyDictionary())


class Keeper:
    """Finds the kept conversation that a call of `generate` goes on in, and keeps the call's own.

    Clients send the whole conversation each time. They may send answers back changed: thoughts are left out, and text
    becomes other tokens. So a conversation has two snapshots, after the prompt and after the answer.

    Args:
        model: what generates.
        number: how many conversations are kept at most.
        on_cpu: whether they are kept in the memory of the CPU.

    Attributes:
        kept: the conversations kept on the model.
        basis, snapshots: of this call's conversation.
        before: the conversation that it goes on in, or kept last.
    """

    def __init__(self, model: PreTrainedModel, number: int, on_cpu: bool):
        self.model, self.number, self.on_cpu = model, number, on_cpu
        self.kept = all_kept().setdefault(model, {}).setdefault(KeptConversations, KeptConversations())
        self.basis: tuple = ()
        self.snapshots: list[Stream] = []
        self.before: Optional[Conversation] = None

    def resume(self, stream: Stream, ids: torch.Tensor, media: list[SeenMedia], pads: list[int], most: int) -> Stream:
        """A copy of the kept stream in which a prompt has the fewest columns to read, else this new `stream`.

        Args:
            ids: the prompt, int64 `[batch, columns]`.
            media: the images or the like in it.
            pads: `[rows]`, its columns of left padding.
            most: the column from which it must be read at the latest.
        """
        self.basis, ids = basis(self.model, stream), ids.to("cpu", torch.int32)
        found: list[tuple[int, Stream, Conversation]] = []
        for conversation in self.kept.conversations:
            if conversation.basis != self.basis or len(conversation.ids) != len(ids):
                continue
            common = min(conversation.common_length(ids), most)
            for snapshot in conversation.snapshots:
                end = snapshot.latest_end(min(common, snapshot.seen, snapshot.end_of_common_media(media)))
                as_padded = snapshot.pads in (pads, pads * len(ids))
                if as_padded and (end == snapshot.seen or snapshot.can_end_at(end)):
                    found.append((end, snapshot, conversation))
        if not found:
            return stream
        end, snapshot, conversation = max(found, key=lambda each: each[0])
        self.before = conversation
        if end == snapshot.seen:
            self.snapshots = [snapshot]
        resumed = snapshot.copied()
        if end < resumed.seen:
            resumed.take_back(end)
        resumed.record_past = stream.record_past
        return resumed

    def keep(self, stream: Stream, ids: torch.Tensor) -> None:
        """Keep `stream` as it is now. `ids` are all that it has seen, int64 `[batch, columns]`."""
        if not self.snapshots or self.snapshots[-1].seen < stream.seen:
            self.snapshots = [*self.snapshots, stream.copied(self.on_cpu)][-2:]
        conversation = Conversation(ids.to("cpu", torch.int32, copy=True), self.basis, self.snapshots)
        before, kept = self.before, self.kept
        with kept.changing:
            others = [other for other in kept.conversations if other is not before]
            # One that does not begin with all of its prompt may be another that began alike, for which there is room.
            if before in kept.conversations and conversation.common_length(before.ids) < before.snapshots[0].seen:
                others = [before, *others]
            kept.conversations = [*others, conversation][-self.number :]
        self.before = conversation


# ---------------------------------------------------------------------------------------------------------------------
# SinkCache: the cache that transformers and users see
# ---------------------------------------------------------------------------------------------------------------------


class _ModelReference(weakref.ref):
    """A reference that does not keep its model alive. A copy of the cache shares it, and a pickle has None instead."""

    def __deepcopy__(self, memo: dict) -> "_ModelReference":
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


_claiming = threading.Lock()  # held while a call takes a cache into use


class SinkCache(Cache):
    """A cache that keeps the first tokens of a sequence and a window of its latest ones (arXiv:2309.17453).

    *Bound* to a model, it streams. `generate` below binds it, or you do: `cache.bind(model)`. Token `t` attends to the
    first `num_sink_tokens` tokens, the sinks, and to the last `window_length - num_sink_tokens`, itself included. The
    sinks have the positions directly before the oldest of these. `get_seq_length()` is the number of tokens seen.

    That holds for layers with full attention. Layers that slide, attend by chunks or keep a state have the cache that
    transformers gives them. A model that knows the order of tokens by the columns of its cache (ALiBi,
    arXiv:2108.12409) gets what is kept in the order of the sequence. While it works on prepared inputs,
    `get_seq_length()` is how many tokens that are.

    *Unbound*, it is the class that transformers had until 4.52, bit for bit. This is for code that passes `sin` and
    `cos` to `update` itself. The keys that are kept are rotated back at every step, in their own dtype, and
    `get_seq_length()` is the number of tokens stored. Without `sin` and `cos`, it refuses to evict.

    What the cache holds after some tokens, and every logit, depends on these tokens alone: not on how they were cut
    into forward passes, what else is in the batch, or whether other tokens were taken back in between (`crop`). That is
    so in `generate` below, and in a loop of your own that calls `model(**cache.prepare_inputs(...))`.

    Other calls (`model(input_ids, cache=cache)`, or a plain `model.generate(cache=cache)`; until transformers 5.23
    these name it `past_key_values`) tell a bound cache neither mask nor positions. It looks these up in the calls of
    modules that led to it, as `attention_mask` and `position_ids`. It serves text without padding, up to the length
    that the model was trained on. It refuses a row with padding, and several that may have some once they must evict;
    positions other than the numbers of tokens, which you passed or the model made (of an image in two dimensions, or by
    `rope_deltas` of another conversation); several tokens at once that evict; steps past that length; going on with
    rows that were padded or whose positions were lowered; and any eviction from a cache whose columns the model goes
    by.

    Args:
        window_length (`int`, defaults to 256): the most tokens kept, sinks included.
        num_sink_tokens (`int`, defaults to 4): how many of them are the first of the sequence.
        kv_bits (`int`, *optional*): 8 to keep the recent tokens' keys and values in 8 bits, for a bound cache only. By
            default they are kept as the model makes them, as the sinks are in any case.

    Raises:
        TypeError: an argument is no integer.
        ValueError: not `0 <= num_sink_tokens < window_length`.
    """

    is_compileable = False  # except in `generate`, which prepares each step: see `StreamedCall`

    def __init__(self, window_length: int = 256, num_sink_tokens: int = 4, kv_bits: Optional[int] = None):
        window = checked_window(window_length, num_sink_tokens, kv_bits)
        self.held: Union[Stream, UnboundLayers] = UnboundLayers(window)
        init_cache(self)
        self._model: Optional[_ModelReference] = None
        self._used_by: Optional[int] = None  # the thread in which a call of `generate` has it in use
        self.held = UnboundLayers(window)  # again: 4.54 and 4.55 have put a layer of their own into it

    @property
    def layers(self) -> list:
        """The layers of a bound cache."""
        return self.held.layers

    @layers.setter
    def layers(self, layers: list) -> None:
        pass  # set by `Cache.__init__`, when there are none yet

    def reset(self) -> None:
        """Forget all tokens. A bound cache stays bound.

        Like all methods that change the cache, it raises ValueError if a call of `generate` in another thread uses it.
        """
        self._refuse_other_thread()
        self.held = self.held.renewed()

    def bind(self, model: PreTrainedModel) -> "SinkCache":
        """Learn how the layers of `model` rotate their keys, or that they go by columns; return this cache, to stream.

        Args:
            model: a decoder-only model with relative positions, or ALiBi. It is run on a few tokens the first time, and
                again once it was changed. Nothing is changed on it, and the cache does not keep it alive.

        Raises:
            TypeError: `model` is no model of transformers that generates.
            ValueError: `model` can't be streamed. Or the cache is bound to another model, with other keys and values.
                Or it holds tokens that it took in unbound, or whose keys `model` would rotate otherwise by now.
        """
        model = unwrapped(model)
        self._refuse_other_thread()
        seen, window = self.get_seq_length(), self.held.window
        if not self.is_bound and seen > 0:
            raise ValueError(
                f"The `SinkCache` in `{CACHE}` was not bound when it took in its {seen} tokens. Call `bind(model)` "
                "before the first token, or `reset()` it."
            )
        bound_to = self._bound_model
        refuse_window(model, window)
        device = model.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            traits = read_model(model)
            if window.bits is not None:
                traits = read_factors(model, traits)
        held_traits = self.held.traits if self.is_bound else None
        if bound_to is model and traits.rotations is held_traits.rotations:
            return self
        stream = Stream(window, traits)
        read_further(model, traits, window.length, stream.ceiling - 1)
        if self.is_bound and bound_to is not model and not are_alike(traits.fingerprint, held_traits.fingerprint):
            raise ValueError(
                OTHER_MODEL
                if bound_to is None
                else f"The `SinkCache` in `{CACHE}` is bound to another model, whose keys and values mean nothing to "
                "this one. Use a `SinkCache` for each model."
            )
        if seen > 0 and not rotate_alike(rotations_by_name(traits), rotations_by_name(held_traits)):
            raise ValueError(
                f"`model` rotates its keys otherwise than for the {seen} tokens that the `SinkCache` in `{CACHE}` "
                "holds, with which new ones would not fit together: its rotary embeddings are others. `reset()` it, or "
                "use a new one."
            )
        if seen > 0:
            self.held.rebind(traits)
        else:
            self.held = stream
        self._model = _ModelReference(model)
        return self

    @property
    def _bound_model(self) -> Optional[PreTrainedModel]:
        """The model that the cache is bound to, if it is still there, and in this process."""
        return None if self._model is None else self._model()

    @property
    def window_length(self) -> int:
        """The most tokens kept, sinks included."""
        return self.held.window.length

    @property
    def num_sink_tokens(self) -> int:
        """How many of the tokens kept are the first of the sequence."""
        return self.held.window.num_sinks

    @property
    def kv_bits(self) -> Optional[int]:
        """In how many bits each number of the recent tokens is kept, None if that is as the model made it."""
        return self.held.window.bits

    @property
    def is_bound(self) -> bool:
        """Whether `bind` was called. A cache that comes from another process stays bound, though without a model."""
        return isinstance(self.held, Stream)

    @property
    def key_cache(self) -> list[Optional[torch.Tensor]]:
        """The keys of each layer, `[batch, kv_heads, tokens kept, head_dim]`; None for a layer that has none.

        They are in the order of the sequence if the cache is unbound, and by slots if it is bound.
        """
        return self.held.keys

    @property
    def value_cache(self) -> list[Optional[torch.Tensor]]:
        """The values of each layer, like `key_cache`."""
        return self.held.values

    @property
    def batch_size(self) -> int:
        """The rows of the batch held, -1 if it holds nothing yet."""
        return self.held.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache's tensors take."""
        return sum(tensor.nbytes for tensor in self.held.tensors())

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_kwargs: Optional[dict[str, Any]] = None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the keys and values of new tokens, and return those that the new tokens attend to.

        Args:
            key_states: `[batch, kv_heads, length, head_dim]`, rotated to their positions by the model.
            value_states: `[batch, kv_heads, length, value_head_dim]`.
            cache_kwargs: for an unbound cache only. `sin` and `cos` are `[window_length, rotary_dim]`, or
                `[1, length, rotary_dim]` for the new tokens. `partial_rotation_size` is how many leading dimensions
                rotate, if not all do.

        Returns:
            Keys and values, with the tokens attended to in dimension 2.

        Raises:
            ValueError: an unbound cache would have to evict, but was given no `sin` and `cos`. Or the model of a bound
                one was called without `prepare_inputs` where that is needed.
        """
        self._refuse_other_thread()
        return self.held.update(key_states, value_states, layer_idx, cache_kwargs, *args, **kwargs)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Take in the new keys of a layer's index, by which it chooses tokens, and return those to choose from.

        The layer's `update` follows. What this raises, it would raise too.

        Args:
            indexer_key_states: `[batch, length, index_dim]`, rotated to their positions by the model.

        Returns:
            `[batch, keys, index_dim]`, in the order of the keys that `update` will return.
        """
        self._refuse_other_thread()
        return self.held.update_indexer(indexer_key_states, layer_idx)

    def prepare_inputs(self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None) -> dict[str, Any]:
        """What to call the bound model with for the next tokens, in a loop of your own: `model(**prepare_inputs(...))`.

        The tokens are text. Images go in through `generate`.

        Args:
            input_ids: the new tokens, int64 `[batch, length]`. The logits are the same however tokens are cut into
                calls. Where new tokens evict others, attention sees `length * num_sink_tokens` more keys, so pass a
                long prompt in pieces. A model that goes by the columns of its cache then takes one token at a time.
            attention_mask: `[batch, columns seen + length]`, 0 for the left padding of a row and 1 for a token. Each
                row has a token at least. Leave it out if there is no padding, or if an earlier call has told of it.

        Returns:
            The arguments for the next call of the model, and for no other. They are `input_ids`, `position_ids` (int64
            `[rows, length]`, bounded), `attention_mask` (None, or `[rows, 1, length, keys]`) and this cache, as `cache`
            or until transformers 5.23 `past_key_values`. A model that goes by the columns of its cache gets no
            `position_ids`, and its `attention_mask` is int64 `[batch, keys]`.

        Raises:
            ValueError: the cache is not bound, or the arguments don't fit what it holds.
        """
        model = self._bound_model
        if model is None:
            raise ValueError(
                "The `SinkCache` must be bound first, to a model that is still there: `cache.bind(model)`."
            )
        self._refuse_other_thread()
        stream = self.held
        stream.settle()
        start, (batch_size, length) = stream.seen, input_ids.shape
        needed = [batch_size, start + length]
        if attention_mask is not None and list(attention_mask.shape) != needed:
            raise ValueError(
                f"`attention_mask` must be {needed}, for {start} tokens seen and {length} new ones, got "
                f"{list(attention_mask.shape)}."
            )
        at_once = stream.most_at_once(start)
        if length > at_once:
            raise ValueError(f"`input_ids` must be at most {at_once} tokens at a time for this model, got {length}.")
        stream.begin(batch_size, stream.pads if start > 0 and attention_mask is None else left_padding(attention_mask))
        inputs = {"input_ids": input_ids, "attention_mask": None, stream.traits.cache_name: self}
        inputs = inputs_for_step(stream, model, inputs, Caller.LOOP)
        if len(stream.transcript.parts) >= MOST_PARTS:
            stream.trim_transcript()
        stream.transcript = stream.transcript.with_ids(input_ids.clone(), start)  # which the caller may write into
        return inputs

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        """How many columns a bound cache has seen, or how many tokens an unbound one stores.

        It is how many are kept while a model that goes by the columns of its cache works on prepared inputs.
        """
        return self.held.seq_length(layer_idx)

    def get_max_length(self, *args, **kwargs) -> Optional[int]:
        """The most tokens kept: `window_length`.

        A model that brings code of its own is told that there is no limit: it would crop the mask to one.
        """
        return NO_LIMIT if self.is_bound and self.held.traits.brings_code else self.window_length

    get_max_cache_shape = get_max_length

    @property
    def seen_tokens(self) -> int:
        """How many columns came in, those that were evicted included. The code of some models asks for it."""
        return self.held.seen

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
        """How many keys `update` will return beside those of new tokens. The code of some models asks for it."""
        return self.get_mask_sizes(new_seq_length, layer_idx)[0] - new_seq_length

    def get_mask_sizes(
        self,
        query_length: Union[torch.Tensor, int, None] = None,
        layer_idx: int = 0,
        cache_position: Optional[torch.Tensor] = None,
    ) -> tuple[int, int]:
        """The number of keys that `update` will return, and the column that the first of them counts as.

        Args:
            query_length: how many tokens are new. Until 5.3, transformers passes their columns, int64 `[length]`, in
                older releases as `cache_position`.
        """
        self._refuse_other_thread()
        return self.held.mask_sizes(query_length if cache_position is None else cache_position, layer_idx)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was: int64 `[batch]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch, in that order: int64 `[new batch]`."""
        self._refuse_other_thread()
        self.held = self.held.with_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        indices = torch.arange(max(self.batch_size, 0), dtype=torch.long, device="cpu")
        self.batch_select_indices(indices.repeat_interleave(repeats))

    def crop(self, tokens: Optional[int] = None, **named: int) -> None:
        """Take back the latest tokens.

        Until the first eviction, any number can be taken back. After it, those of the last update can, or with
        `activate_past_recording` all since the last `crop`.

        Args:
            tokens: how many columns to forget, as a negative number, or how many to keep, as a positive one. 0 means
                what it does in the release of transformers: nothing to forget where the argument is called
                `tokens_to_remove`, and nothing to keep where it is `max_length`. Both names are taken.
            named: the same, by one of these names.

        Raises:
            TypeError: not exactly one integer was given.
            ValueError: what the tokens evicted is gone; or a row would be left without a token; or the cache is not
                bound, or has layers that can't take tokens back. The cache is as it was then.
        """
        self._refuse_other_thread()
        if tokens is not None and not named:
            tokens, named = None, {CROP_ARGUMENT: tokens}
        if tokens is not None or len(named) != 1 or not named.keys() <= {"tokens_to_remove", "max_length"}:
            raise TypeError(f"`crop` takes one int, `{CROP_ARGUMENT}`, got {tokens!r} and {named}.")
        ((name, tokens),) = named.items()
        tokens = integer(name, tokens)  # assisted decoding of some releases counts in a tensor
        if not self.is_bound or not self.held.can_take_back:
            raise ValueError(
                "A `SinkCache` can be cropped only if bound to a model with full attention in every layer, or where "
                "transformers lets the layers that slide take tokens back, after `activate_past_recording()`. Got "
                f"`{name}` {tokens}."
            )
        stream = self.held
        stream.settle()
        seen, padding = stream.seen, max(stream.pads)
        end = tokens if tokens > 0 or (tokens == 0 and name == "max_length") else seen + tokens
        if end >= seen and seen > 0:
            end = seen  # there is nothing to forget, which settles what was recorded
        if end < seen and end <= padding:
            if end == 0:
                self.reset()
                return
            raise ValueError(
                f"`{name}` must leave a token of each row, {padding + 1} columns or more, got {tokens} of {seen}. To "
                "forget all of them, `reset()` it."
            )
        if end < seen - stream.num_removable:
            raise ValueError(
                f"`{name}` can forget {stream.num_removable} of the {seen} tokens seen, got {tokens}: what those "
                f"before evicted from the window of {self.window_length} is gone. `reset()` it and pass the "
                "conversation anew."
            )
        if stream.latest_end(end) < end:
            raise ValueError(
                f"`{name}` must leave columns {stream.latest_end(end)} to {end} out too, got {tokens}: they saw later "
                "ones that would be forgotten, as those of an image do."
            )
        stream.take_back(end)

    def activate_past_recording(self) -> None:
        """From now on, have `crop` take back all tokens since it was called last, not only those of the last update.

        What they evict is kept for that, at most a window of it. Assisted decoding calls this in newer releases.
        """
        if self.is_bound:
            self.held.record_past = True

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write the conversation to one safetensors file, from which `load` goes on in any process.

        An older file at `path` is replaced in one step, and the new one has its mode. So whatever ends this, `path`
        holds the old conversation or the new one. A kill may leave an unfinished file `.sink_cache-*` beside it.

        The model is run on a few tokens if it was changed since the last call of `generate` or `bind`. Where its
        weights are spread over processes, all of them must call this then.

        Raises:
            ValueError: the cache is not bound, empty, or in use by another thread; or it holds numbers that are not
                finite, or was left in the middle of a forward pass by an error.
            OSError: `path` can't be written.
        """
        if not self.is_bound or self.get_seq_length() == 0:
            raise ValueError("Only a bound `SinkCache` that holds tokens can be saved.")
        self._refuse_other_thread()
        stream, model = self.held, self._bound_model
        stream.settle()
        if model is not None:
            stream.traits = replace(stream.traits, fingerprint=fingerprint_of(model, stream.traits))
        state, tensors = pack(stream)
        write_file(path, tensors, {"sink_cache": json.dumps(state)})

    @staticmethod
    def kept_nbytes(model: PreTrainedModel) -> int:
        """How many bytes of memory the conversations take that `generate` keeps on `model`, wherever it comes from.

        Each takes at most two windows, as they were after its latest prompt and after the answer, with what their
        latest update evicted, and 4 bytes for each token of the conversation.
        """
        return sum(kept.nbytes for kept in list(all_kept().get(unwrapped(model), {}).values()))

    @staticmethod
    def forget_kept(model: PreTrainedModel) -> None:
        """Forget the conversations that `generate` keeps on `model`, wherever this `generate` comes from."""
        all_kept().pop(unwrapped(model), None)

    @classmethod
    def load(cls, path: Union[str, os.PathLike], model: PreTrainedModel) -> "SinkCache":
        """The cache that `save` wrote to `path`, bound to `model`.

        The `model` is the one that the conversation was held with. It is run on a few tokens, and nothing is changed on
        it. Where its weights are spread over processes, all of them must call this.

        Raises:
            ValueError: `path` is no such file, is damaged or has a newer format; or `model` is another one, or can't be
                streamed. The message names the path, and says which it is.
            OSError: `path` can't be read.
        """
        text, tensors = read_file(path)

        def refusal(error: Exception) -> ValueError:
            reason = str(error)
            if not isinstance(error, ValueError):  # for example, the file is from another release of transformers
                reason = f"what it holds does not fit the layers that this model has here ({error!r})"
            return ValueError(f"The conversation in `path`, {os.fspath(path)!r}, can't be loaded: {reason}")

        with telling(refusal):
            state = checked_state(text, tensors)
            cache = cls(state["window_length"], state["num_sink_tokens"], state.get("kv_bits")).bind(model)
            model, stream = cache._bound_model, cache.held
            refuse_other_model(tensors, stream.traits, fingerprint_of(model, stream.traits))
            unpack(stream, state, tensors, input_device(model))
        return cache

    # One call at a time

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets, which is not in use itself."""
        self._refuse_other_thread()  # a copy could have half a step of its work
        return vars(self) | {"_used_by": None}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Reserve the cache for the block, which is one call of `generate`. Raise ValueError if another one has it."""
        thread, claimed = threading.get_ident(), False
        try:
            with _claiming:
                self._refuse_use_but_by(None)
                claimed = True  # before it is, as an interrupt may come in between
                self._used_by = thread
            yield
        finally:
            if claimed and self._used_by == thread:
                self._used_by = None

    def _refuse_other_thread(self) -> None:
        """Raise a ValueError if a call of `generate` in another thread has this cache in use."""
        if not torch.compiler.is_compiling():  # else this is the call's own thread, and compiled code can't ask which
            self._refuse_use_but_by(threading.get_ident())

    def _refuse_use_but_by(self, thread: Optional[int]) -> None:
        """Raise a ValueError if a call of `generate` has this cache in use, except in this thread."""
        if self._used_by not in (None, thread):
            raise ValueError(
                f"The `SinkCache` in `{CACHE}` is in use by another call of `generate`, which goes on. Wait until that "
                "has ended, or use a cache for each call."
            )


# ---------------------------------------------------------------------------------------------------------------------
# One call of `generate`
# ---------------------------------------------------------------------------------------------------------------------

# Settings of a generation that are served here, or that a model's files ask for and a cache that is passed replaces.
SERVED = {"prefill_chunk_size": None, "cache_implementation": None, "use_cache": True, "return_legacy_cache": None}


def copied_with(config: Any, **settings) -> Any:
    """`config`, or where that changes it a copy, with these attributes."""
    if any(getattr(config, name, None) != value for name, value in settings.items()):
        config = copy.deepcopy(config)
        for name, value in settings.items():
            setattr(config, name, value)
    return config


def chunks_of_prompt(
    stream: Stream, length: int, takes_masks: bool, chunk_size: Optional[int], least_last: int, together: int = 0
) -> list[slice]:
    """Cut `length` new tokens of a prompt into updates: what fits into the window at once, the rest in chunks.

    How a prompt is cut is a matter of time and memory alone. A chunk costs a pass over the weights, and for each token
    of it attention sees one more copy of the sinks. So by default a chunk has so many tokens that these copies take
    three quarters of a window, and at most 256: with more of them, attention would take more time than passes save.

    Args:
        takes_masks: whether the model's attention does. If not, or if the model goes by the columns of its cache, what
            evicts goes in token by token.
        chunk_size: `prefill_chunk_size` of `generate`.
        least_last: how many tokens the last update must have at least.
        together: how many of the last tokens come in one update, as far as a chunk holds them.
    """
    start, window, traits = stream.seen, stream.window, stream.traits
    continues, ordered = traits.continues_states, traits.ordered
    default = min(max(3 * window.length // (4 * max(window.num_sinks, 1)), 1), MOST_IN_A_CHUNK)
    several = takes_masks and continues and not ordered
    evicting = min(chunk_size or default, stream.most_at_once(start + length)) if several else 1
    fits = window.length - max(max(start - pad, 0) for pad in stream.pads)
    cuts = range(1, length) if stream.ahead is None else stream.ahead.cuts(start)
    latest = length - max(least_last, min(together, evicting))
    ends = [*(cut for cut in cuts if cut <= latest), length]
    chunks, end = [], 0
    while end < length:
        free = fits - end if continues or start + end == 0 else 0
        wanted = end + (min(free, chunk_size or free) if free > 0 else evicting)
        number = bisect.bisect(ends, wanted)  # so many of the ends are no later
        begin, end = end, ends[number - 1] if number > 0 and ends[number - 1] > end else ends[number]
        chunks.append(slice(begin, end))
    for chunk in chunks:
        number, most = chunk.stop - chunk.start, stream.most_at_once(start + chunk.start)
        if stream.ahead is not None and number > most:
            raise ValueError(
                f"`input_ids` have {number} tokens that come at once, as some see later ones, like those of an image. "
                f"This model can take {most}. Pass a smaller image."
            )
    if length > fits and len(chunks) > 1 and (ordered or not takes_masks):
        reason = (
            "the model knows the order of tokens by the columns of its cache, which are others for each token. Choose "
            "a longer `window_length`"
            if ordered
            else 'the model\'s `attn_implementation`, flash attention, takes no mask. Load the model with "sdpa"'
        )
        _logger.warning_once(f"Past the window this prompt goes in token by token: {reason} to have it go in faster.")
    return chunks


def refuse_other_positions(stream: Stream, positions: Optional[torch.Tensor]) -> None:
    """Raise if the model's `positions` (`[..., rows, length]`) of a prompt go on otherwise than by one a token."""
    if positions is None:
        return
    natural = stream.natural_positions(positions.shape[-1])
    if ((positions.cpu() != natural) & (natural >= 0)).any():
        raise ValueError(
            "`model` gives the prompt positions other than 0, 1, 2, ... (as those of images in two dimensions), "
            "and a stream moves its sinks by as many as there are tokens. Pass a prompt of text."
        )


class Phase(enum.Enum):
    """What the decoding loop of a call is at."""

    BEFORE = "it has not got the cache yet"
    PROMPT = "it prepares its prompt next"
    DECODE = "it has read its prompt, and generates"
    IDLE = "it has generated all, and runs passes that other processes wait for"


class _Caught(Exception):
    """Ends a forward pass before its decoder, whose arguments it has."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


# What a decoder is handed down with an entry for each column of the prompt, in dimension 1, and what of it is marked
# there: for each mark, row by row, a tensor in a list has an entry.
HANDED_PER_COLUMN = ("inputs_embeds", "per_layer_inputs", "visual_pos_masks", *TOKEN_TYPES)
HANDED_BY_MARKS = {"deepstack_visual_embeds": "visual_pos_masks"}
# What is of whole images, and of use to their tower alone: some models hand down whatever processors of others give.
HANDED_OF_IMAGES = ("image_sizes",)
# And what a stream has its own of.
HANDED_AND_LEFT = ("input_ids", "attention_mask", "position_ids", "cache_position", CACHE, OLDER_NAME)


@dataclass(frozen=True, eq=False)
class HandedDown:
    """What the modules around a decoder, as a tower for images, hand down to it for a prompt.

    Args:
        start: the first column of the prompt.
        arguments: of the decoder, by name.
    """

    start: int
    arguments: dict[str, Any]

    @property
    def unknown(self) -> list[str]:
        """The names of tensors of which is not known what they have for which column."""
        known = {*HANDED_PER_COLUMN, *HANDED_BY_MARKS, *HANDED_OF_IMAGES, *HANDED_AND_LEFT}
        return [name for name, value in self.arguments.items() if name not in known and _holds_numbers(value)]

    def media(self, model: PreTrainedModel, input_ids: torch.Tensor) -> list[SeenMedia]:
        """The images or the like among its columns, which `input_ids` (`[batch, columns]`) end with."""
        embeddings = self.arguments.get("inputs_embeds")
        if embeddings is None:
            return []
        ids = input_ids[:, -embeddings.shape[1] :].clamp(max=vocabulary(model) - 1)
        return SeenMedia.all_in(embeddings, model.get_input_embeddings()(ids), self.start)

    def of_columns(self, start: int, end: int) -> dict[str, Any]:
        """The arguments for these columns, but for what the stream gives."""
        columns = slice(start - self.start, end - self.start)
        given = {name: value for name, value in self.arguments.items() if name not in HANDED_AND_LEFT}
        for name, of_marks in HANDED_BY_MARKS.items():
            marks = given.get(of_marks)
            if given.get(name) is not None and marks is not None:
                chosen = torch.zeros_like(marks)
                chosen[:, columns] = True
                given[name] = [entries[chosen[marks].to(entries.device)] for entries in given[name]]
        for name in HANDED_PER_COLUMN:
            if given.get(name) is not None:
                given[name] = given[name][:, columns]
        return given


class StreamedCall:
    """One call of `generate`: a stand-in for the model, which prepares its inputs for a cache.

    Every decoding loop of transformers passes by some methods of the model. The stand-in shares all of the model but
    these, which are the methods of the same names here. So nothing is set on the model: calls from other threads can't
    meet this one's, and nothing has to be undone after an error. A call goes so:

    1. `generate` binds the cache to the model, and `decode` runs the decoding loop of transformers on the stand-in.
    2. `_validate_model_kwargs`: the loop checks its arguments.
    3. `_prepare_model_inputs`: the first to see what the loop got. What is not in the conversation is taken back.
    4. `_prepare_generated_length`, `_get_stopping_criteria`: how long the loop goes on.
    5. `_valid_auto_compile_criteria`: whether single tokens go in by compiled code.
    6. `prepare_inputs_for_generation`, of the prompt: it is cut into chunks, and the model run on all but the last.
       With images, what is around the decoder runs first, once, and the decoder then gets its part for each chunk.
    7. The loop runs the model on the last chunk. In each layer the model calls `SinkCache.update`.
    8. `_update_model_kwargs_for_generation`: the update is done. What would grow with the stream is cut.
    9. The loop chooses a token, and `prepare_inputs_for_generation` gives it its position and mask.
    10. The loop runs the model on it, and goes on at 8 until its stopping criteria are met.
    11. `decode` ends the call, whatever ended the loop: nothing is left of it but what the stream holds.

    Args:
        model: the model, which `cache` is bound to.
        cache: in use by this call alone.
        chunk_size, progress: `prefill_chunk_size` and `prefill_progress` of `generate`.
        assisted: whether the loop takes tokens back.
        keeper: of the conversations kept on the model; None if the cache was given, or none are to be kept.

    Attributes:
        stand_in: what the decoding loop runs on.
        takes_cache_as: by which name the model takes the cache to prepare its inputs.
        phase: what the loop is at.
        columns: how many columns the conversation has that it got.
        columns_not_passed: how many of the first of them `input_ids` leave out.
        mask_given: whether its mask was given with it.
        embeddings: its `inputs_embeds`, `[batch, length, hidden size]`, if there are some.
        media_names: of its images or the like, before transformers encodes them and drops these.
        arguments: what the loop got, of a prompt with images or the like whose positions the model makes before it.
        handed: what the decoder is given of the prompt in place of what its tokens alone would be; None if nothing is.
        kept_at: after how many columns the conversation is kept next; None if it isn't.
        compiles: whether single tokens go in by compiled code, of transformers or of the user.
        uncompiled: what runs the model otherwise, if the user compiled it as a whole.
    """

    REPLACED = ("_prepare_model_inputs", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    REPLACED += ("_prepare_generated_length", "_get_stopping_criteria", "_valid_auto_compile_criteria")
    REPLACED += ("_validate_model_kwargs", *MAKES_POSITIONS)

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SinkCache,
        chunk_size: Optional[int] = None,
        progress: bool = False,
        assisted: bool = False,
        keeper: Optional[Keeper] = None,
    ):
        # The model's own methods set things on it too.
        self.model = model = shared_path(model)
        self.cache, self.chunk_size, self.progress = cache, chunk_size, progress
        self.assisted, self.keeper, self.kept_at = assisted, keeper, None
        self.stand_in = shared(model)
        # A model loaded from a repository that carries this file has `generate` below in its own place.
        vars(self.stand_in).pop("generate", None)
        vars(self.stand_in)["_streamed_call"] = self
        for name in self.REPLACED:
            # With the signature of the model's method, in which transformers looks up the arguments that it takes.
            ours = functools.partial(getattr(self, name))
            vars(self.stand_in)[name] = functools.update_wrapper(ours, getattr(model, name))
        self.takes_cache_as = cache_name(model.prepare_inputs_for_generation)
        self.phase, self.handed, self.arguments = Phase.BEFORE, None, None
        self.columns, self.columns_not_passed, self.mask_given, self.embeddings = 0, 0, False, None
        self.media_names: tuple[str, ...] = ()
        self.uncompiled = uncompiled_code(model)
        self.compiles = (
            not assisted
            and self._can_step_in_tensors
            and any("_orig_mod" in module._modules or uncompiled_code(module) for module in modules_of(model))
        )

    @property
    def stream(self) -> Stream:
        """The cache at work."""
        return self.cache.held

    @functools.cached_property
    def decoder(self) -> torch.nn.Module:
        """The model's own decoder, by `path_to_decoder`; the model itself if there is no path."""
        return self.model.get_submodule(".".join(path_to_decoder(self.model)))

    def decode(self, loop: Callable, kwargs: dict[str, Any]) -> Any:
        """Run the decoding `loop` on the stand-in, which is of no use afterwards."""
        self.stand_in.generation_config = copied_with(self.stand_in.generation_config, **SERVED)
        recorded = self.stream.record_past
        try:
            output = loop.__get__(self.stand_in)(**{CACHE: self.cache}, **kwargs)
            if self.phase is Phase.BEFORE:
                raise ValueError(
                    f"`model` ({type(self.model).__name__}) has a `generate` of its own that did not hand "
                    f"`{CACHE}` on to that of transformers, so nothing was streamed. Have it pass on the "
                    "arguments that it doesn't know."
                )
            if self.keeper is not None and self.phase is not Phase.PROMPT:
                self._keep()
            return output
        finally:
            stream = self.stream
            stream.record_past = recorded
            stream.leave()
            stream.trim_transcript()
            vars(self.stand_in).clear()  # it and its methods hold each other, and the cache
            vars(self.stand_in).update(vars(self.model))  # DeepSpeed keeps what ran, and looks at it in the next run
            after_a_call(self.cache._bound_model)

    # The methods that stand in place of the model's, in the order in which a loop calls them

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> tuple:
        """As ever. It is the first to see what the loop was given, by a `generate` of the model's own perhaps."""
        if model_kwargs.get(CACHE) is self.cache:
            given, stream = {"inputs": inputs} | model_kwargs, self.stream
            self.columns, self.columns_not_passed, _ = prompt_columns(given)
            end = stream.end_in_common(given)
            if end < stream.seen:
                stream.take_back(end)
            self.mask_given, self.embeddings = given.get("attention_mask") is not None, given.get("inputs_embeds")
            self.media_names = tuple(media_inputs(model_kwargs))
            self.phase = Phase.PROMPT
            if stream.seen > 0 or not is_known_by_ids(model_kwargs):
                self.keeper = None
        return self.model._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As ever, with the cache by the name that the model has for it."""
        named = {self.takes_cache_as if name == CACHE else name: value for name, value in model_kwargs.items()}
        self.model._validate_model_kwargs(named)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """As ever; of a prompt with images or the like, those of text, and its own later, of what is passed alone."""
        own = type(self.model)._prepare_position_ids_for_generation
        of_text = transformers.GenerationMixin._prepare_position_ids_for_generation
        if not media_inputs(model_kwargs) or model_kwargs.get(CACHE) is not self.cache or own is of_text:
            return self.model._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        self.arguments = {"input_ids": inputs_tensor} | model_kwargs
        return of_text(self.model, inputs_tensor, model_kwargs)

    def _prepare_generated_length(self, generation_config: Any, input_ids_length: int, **kwargs) -> Any:
        """As ever, but 20 new tokens, where no number is named, end at no length that the model was trained on."""
        length = generation_config.max_length
        config = self.model._prepare_generated_length(
            generation_config=generation_config, input_ids_length=input_ids_length, **kwargs
        )
        if kwargs["has_default_max_length"] and config.max_new_tokens is None and config.max_length > length:
            config.max_length = length + input_ids_length
        return config

    def _get_stopping_criteria(self, *args, **kwargs) -> list:
        """As ever, without the warning that quality degrades past a length: the positions of a stream are bounded."""
        given = kwargs.get("stopping_criteria") or []
        criteria = self.model._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, transformers.MaxLengthCriteria) and not any(criterion is its for its in given):
                criterion.max_position_embeddings = None
        return criteria

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], *args) -> bool:
        """As ever, for a cache that otherwise is offered to nobody for compilation: its steps are prepared here."""
        one_graph = getattr(self.model, "_can_compile_fullgraph", True)
        if model_kwargs.get(CACHE) is not self.cache or not (CAN_COMPILE and one_graph and self._can_step_in_tensors):
            return self.model._valid_auto_compile_criteria(model_kwargs, *args)
        offered = shared(self.cache)
        offered.is_compileable = True
        valid = self.model._valid_auto_compile_criteria(model_kwargs | {CACHE: offered}, *args)
        self.compiles |= valid
        return valid

    @property
    def _can_step_in_tensors(self) -> bool:
        """Whether single tokens can go in by compiled code: in tensors, with a mask, not in order, and not recorded."""
        stream = self.stream
        in_tensors = all(layer.compiles for layer in stream.layers)
        return in_tensors and takes_masks(self.model) and not stream.record_past

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
        """The model's own inputs, for the new tokens only, fitted to the cache. Of a prompt, for its last chunk."""
        if kwargs.get(CACHE) is not self.cache:  # a generation within this one, as token healing does
            return self.model.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.phase is Phase.PROMPT:
            self.phase = Phase.DECODE
            return self._inputs_of_prompt(input_ids, args, kwargs)
        stream, new = self.stream, self._end_of(input_ids) - self.stream.seen
        self._compile_step(self.compiles)
        if kwargs.get("position_ids") is None:  # 5.3 makes them of the mask, which is taken away after each step
            positions = stream.natural_positions(new)
            kwargs["position_ids"] = positions.to(input_ids.device).expand(len(input_ids), -1)
        inputs = self._own_inputs(input_ids, args, kwargs)
        return inputs_for_step(stream, self.stand_in, inputs, Caller.GENERATE, self.compiles)

    def _inputs_of_prompt(self, input_ids: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same for a prompt: the inputs of its last chunk, after the model was run on those before."""
        pads = left_padding(kwargs.get("attention_mask"), self.mask_given)
        self._compile_step(False)
        media = media_inputs(kwargs)
        around = [*media, *(name for name in TOKEN_TYPES if kwargs.get(name) is not None)]
        handed = self._handed_down(input_ids, args, kwargs) if media else None
        seen = handed.media(self.model, input_ids) if media and self.embeddings is None else []
        if handed is not None and handed.unknown:
            self.keeper = None
        if self.keeper is not None:
            most = self.columns - 1
            self.cache.held = self.keeper.resume(self.stream, input_ids, seen, pads, most)
        stream, end = self.stream, self._end_of(input_ids)
        new = end - stream.seen
        stream.begin(len(input_ids), pads)
        stream.refuse_other_ids(input_ids, end)
        if media:
            stream.refuse_other_media(seen, handed.start)
            stream.media = [each for each in stream.media if each.start < handed.start] + seen
        elif around:
            handed = self._handed_down_of_text(input_ids, args, kwargs)
        if handed is not None:
            self._take_down(handed)
        if self.embeddings is not None:  # 5.x cuts off what was seen, of new ones alone too
            embeddings = self.embeddings[:, -new:]
            repeats = len(kwargs["inputs_embeds"]) // len(embeddings)
            kwargs["inputs_embeds"] = embeddings.repeat_interleave(repeats, dim=0)
            kwargs["next_sequence_length"] = new
        kwargs = {name: value for name, value in kwargs.items() if name not in around}
        inputs = self._own_inputs(input_ids, args, kwargs)
        inputs = self._last_chunk(inputs, new_columns=end - self.columns)
        return inputs_for_step(stream, self.stand_in, inputs, Caller.GENERATE)

    def _handed_down(self, input_ids: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> HandedDown:
        """What the modules around the decoder hand down to it for a prompt with images or the like.

        They are run on all that was passed, by which images of before are known again. If they fail on that, only the
        images of new tokens may have been passed, and they are run on these.
        """
        seen, first = self.stream.seen, self.columns_not_passed
        try:
            handed = self._caught(input_ids, first, args, kwargs)
        except ValueError:
            if first == seen:
                raise
            handed = self._caught(input_ids, seen, args, kwargs)
        if handed.unknown and handed.start < seen:
            raise ValueError(
                f"`input_ids` must be the new tokens alone, with the `attention_mask` of all, and their images: this "
                f"model hands {handed.unknown} down to its decoder, of which is not known what belongs to which token."
            )
        return handed

    def _handed_down_of_text(
        self, input_ids: torch.Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Optional[HandedDown]:
        """The same for text whose types of tokens are passed; None if they change nothing.

        Most often all new tokens have one type. Then a few of them tell, without a mask of as many columns as rows.
        """
        start, end = self.stream.seen, self._end_of(input_ids)
        types = [kwargs[name][:, start - end :] for name in TOKEN_TYPES if kwargs.get(name) is not None]
        if all(bool((each == each[:, :1]).all()) for each in types):
            few = self._caught(input_ids, max(start, end - SOME_COLUMNS), args, kwargs)
            told = few.unknown or any(few.arguments.get(name) is not None for name in TOKEN_TYPES)
            if not told and Ahead.of(start, few.arguments.get("attention_mask")) is None:
                return None
        return self._caught(input_ids, start, args, kwargs)

    def _take_down(self, handed: HandedDown) -> None:
        """Have the decoder get by chunks what was handed down for a prompt, and its columns their positions."""
        stream = self.stream
        stream.ahead = Ahead.of(handed.start, handed.arguments.get("attention_mask"))
        blocks = [] if stream.ahead is None else stream.ahead.blocks()
        stream.blocks = [block for block in stream.blocks if block[0] < handed.start] + blocks
        stream.plan, self.handed = None, handed
        self._place(handed.arguments.get("position_ids"))
        self._run_as(shared_path(self.cache._bound_model, calling(self.decoder, self._decode)))

    def _run_as(self, model: Any) -> None:
        """Have the stand-in run what `model` does, another stand-in for the same one."""
        names = {"forward", "_compiled_call_impl", "_modules"} & vars(model).keys()
        vars(self.stand_in).update({name: vars(model)[name] for name in names})

    def _place(self, positions: Optional[torch.Tensor]) -> None:
        """Place new columns at the `positions` that were handed down, `[..., batch, length]`, if they aren't numbers.

        They were made as of a conversation that begins with the first column handed down.
        """
        stream, handed = self.stream, self.handed
        if positions is None or (positions.diff() == 1).all():
            return
        positions = positions.view(-1, *positions.shape[-2:]).to("cpu", torch.long)
        if not stream.traits.rotates_by_axes:
            raise cant_stream(
                self.model,
                "the keys of images, which have a position on each of several axes, do not move by one rotation. So "
                "they can't be moved as tokens are evicted. Text alone can be streamed.",
            )
        if len(positions) == 4 and (positions[0].diff() == 1).all():  # the first are numbers, and for no rotation
            positions = positions[1:]
        first = -torch.tensor(stream.pads, dtype=torch.long, device="cpu")[:, None]
        if handed.start > 0:
            first = stream.natural_positions(1, handed.start)
        stream.place((positions + first)[..., stream.seen - handed.start :])

    def _caught(self, input_ids: torch.Tensor, start: int, args: tuple, kwargs: dict[str, Any]) -> HandedDown:
        """What the decoder is handed down for the columns from `start` on, as of a prompt without a cache or a mask.

        Args:
            input_ids: those from `columns_not_passed` on.
        """
        ids = input_ids[:, start - self.columns_not_passed :]
        left = (CACHE, "attention_mask", "position_ids", "next_sequence_length")
        kwargs = {name: value for name, value in kwargs.items() if name not in left}
        kwargs = slice_inputs(kwargs, slice(-ids.shape[1], None))
        set_columns(kwargs, 0, ids.shape[1], ids.device)

        def catch(**arguments) -> None:
            raise _Caught(arguments)

        names = [*self.media_names, *(name for name in TOKEN_TYPES if kwargs.get(name) is not None)]
        failed = f"`model` ({type(self.model).__name__}) makes nothing of the prompt and {names}"
        # What it sets on itself is for nobody else.
        model = shared_path(self.cache._bound_model, calling(self.decoder, catch))
        with telling(lambda error: ValueError(f"{failed}: {error!r}")):
            positions = self._positions_around(model, ids, start)
            kwargs |= {} if positions is None else {"position_ids": positions}
            mask = torch.ones_like(ids)  # of which some make positions
            inputs = model.prepare_inputs_for_generation(ids, *args, attention_mask=mask, **kwargs)
            inputs.pop("attention_mask", None)
            try:
                model(**inputs, return_dict=True)
            except _Caught as caught:
                return HandedDown(start, caught.arguments)
            raise RuntimeError("its decoder was not run")

    def _positions_around(self, model: Any, ids: torch.Tensor, start: int) -> Optional[torch.Tensor]:
        """The positions of `ids` (`[batch, length]`, from column `start` on) by the model's own rule before the loop.

        None if it has no rule there, but in its forward.
        """
        if self.arguments is None:
            return None
        given = self.arguments
        rows, first = len(prompt_ids(given)), start - self.columns_not_passed
        passed = prompt_ids(given)[:, first:]
        given = {name: value for name, value in given.items() if name not in (CACHE, "inputs", "input_ids")}
        given = slice_inputs(given, slice(-passed.shape[1], None)) | {"attention_mask": torch.ones_like(passed)}
        positions = model._prepare_position_ids_for_generation(passed, given)
        positions = positions.repeat_interleave(len(ids) // rows, dim=-2)
        more = torch.arange(1, ids.shape[1] - passed.shape[1] + 1, dtype=torch.long, device=ids.device)  # a draft
        largest = positions.amax((0, -1), keepdim=True) if positions.dim() == 3 else positions.amax(-1, keepdim=True)
        return torch.cat([positions, (largest + more).expand(*positions.shape[:-1], -1)], dim=-1)

    def _decode(self, **arguments) -> Any:
        """Run the decoder on an update of a prompt with what was handed down for its columns."""
        plan, handed = self.stream.plan, self.handed
        if plan is None:  # an idle pass, see `SyncedCall`
            return self.decoder(**arguments)
        arguments |= handed.of_columns(plan.start, plan.end)
        if handed.arguments.get("inputs_embeds") is not None:
            arguments["input_ids"] = None
        return self.decoder(**arguments)

    def _end_of(self, input_ids: torch.Tensor) -> int:
        """The column after `input_ids`, `[batch, length]`, which are all that the loop has."""
        return self.columns_not_passed + input_ids.shape[1]

    def _own_inputs(self, input_ids: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the model's own method makes of its arguments, for the new columns only, with the cache."""
        stream, start, end = self.stream, self.stream.seen, self._end_of(input_ids)
        stream.transcript = stream.transcript.with_ids(input_ids, self.columns_not_passed)
        set_columns(kwargs, start, end, input_ids.device)
        kwargs[self.takes_cache_as] = kwargs.pop(CACHE)
        inputs = self.model.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        for name in (CACHE, OLDER_NAME):
            inputs.pop(name, None)
        # Some models start over where their frequencies change, 5.3 and later take new ids for new tokens all, and code
        # that comes with a model may leave positions of all tokens.
        inputs = slice_inputs(inputs, slice(start - end, None))
        return inputs | {stream.traits.cache_name: self.cache}

    def _compile_step(self, compiled: bool) -> None:
        """Have the next forward pass compiled by the user's code, if there is some, or not."""
        own = vars(self.model) if compiled else self.uncompiled
        vars(self.stand_in).update({name: own[name] for name in self.uncompiled})

    def _last_chunk(self, inputs: dict[str, Any], new_columns: int) -> dict[str, Any]:
        """Run the model on all of a prompt but its last chunk; the inputs of that.

        Of the columns, the loop itself has appended so many `new_columns`, as the draft of assisted decoding. It needs
        the logits of these and of the token before them, so they come in one chunk.
        """
        stream, length = self.stream, new_tokens(inputs).shape[1]
        # What a template may leave out later comes in one update, to be taken back then.
        together = 0 if self.keeper is None else ANSWER_PREFIX
        chunks = chunks_of_prompt(stream, length, takes_masks(self.model), self.chunk_size, new_columns + 1, together)
        if self.keeper is not None:
            self.kept_at = self.columns
            if stream.traits.continues_states and (self.assisted or not stream.can_take_back):
                # It can't be taken back, so the prompt is kept before it.
                self.kept_at = stream.latest_end(self.kept_at - ANSWER_PREFIX)
                chunks = cut_at(chunks, self.kept_at - stream.seen)
        if self.handed is not None:
            self._refuse_handed(chunks)
        if stream.positions is None:
            refuse_other_positions(stream, inputs.get("position_ids"))
        recording = stream.record_past
        stream.record_past = recording and len(chunks) == 1  # nobody takes back what comes before the last chunk
        self._prefill(inputs, chunks[:-1])
        stream.record_past = recording
        return inputs if len(chunks) == 1 else slice_inputs(inputs, chunks[-1])

    def _refuse_handed(self, chunks: list[slice]) -> None:
        """Raise ValueError if what the decoder is handed down can't be streamed in these chunks."""
        if self.handed.unknown and len(chunks) > 1:
            raise ValueError(
                "Images or the like can't be streamed in a prompt that goes in by chunks, with this model: it hands "
                f"{self.handed.unknown} down to its decoder, of which is not known what belongs to which token. Pass a "
                "shorter prompt, or a greater `window_length`."
            )

    def _prefill(self, inputs: dict[str, Any], chunks: list[slice]) -> None:
        """Run the model on these chunks of its inputs."""
        for chunk in transformers.logging.tqdm(chunks, desc="prompt", unit="chunk", disable=not self.progress):
            chunk_inputs = inputs_for_step(self.stream, self.stand_in, slice_inputs(inputs, chunk), Caller.GENERATE)
            self.stand_in(**chunk_inputs, return_dict=True)
            self.stream.finish_update()
            self._keep_prompt()

    def _keep_prompt(self) -> None:
        """Keep the conversation if this is where its prompt is kept."""
        if self.kept_at == self.stream.seen:
            self.kept_at = None
            self._keep()

    def _keep(self) -> None:
        """Keep the conversation as it is now."""
        self.keeper.keep(self.stream, self.stream.transcript.ids[:, : self.stream.seen])

    def _update_model_kwargs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """As ever, but what would grow with the stream is cut to the last token: the cache knows of those before."""
        kwargs = self.model._update_model_kwargs_for_generation(*args, **kwargs)
        if kwargs.get(CACHE) is not self.cache:
            return kwargs
        self.stream.finish_update()
        self._keep_prompt()
        if self.handed is not None:
            self._run_as(self.model)
            self.stream.ahead = self.stream.axes = self.handed = None
        kwargs.pop("attention_mask", None)
        growing = {name: kwargs[name] for name in ("position_ids", *TOKEN_TYPES) if kwargs.get(name) is not None}
        return kwargs | {name: entries[..., -1:] for name, entries in growing.items()}


class SyncedCall(StreamedCall):
    """A call of one of several processes that generate with one distributed model, each its own text (`synced_gpus`).

    FSDP and DeepSpeed ZeRO-3 collect a layer's weights from all ranks whenever it runs, so all ranks must run as many
    forward passes. A rank that has no more to do runs *idle* ones until all are finished: one token for each row, with
    a cache that is thrown away. By itself transformers has it go on in its own cache, with tokens that were seen.
    """

    REPLACED = (*StreamedCall.REPLACED, "_has_unfinished_sequences", "get_compiled_call")

    def _has_unfinished_sequences(self, this_peer_finished: Union[torch.Tensor, bool], *args, **kwargs) -> bool:
        """As ever: whether any rank has to go on. That is when this one may be finished before others."""
        unfinished = self.model._has_unfinished_sequences(this_peer_finished, *args, **kwargs)
        if unfinished and bool(this_peer_finished):
            self.phase = Phase.IDLE
        return unfinished

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
        if self.phase is Phase.IDLE:
            return self._idle_inputs(input_ids)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """As ever, but idle passes are not compiled: their cache grows by itself."""
        compiled_call = type(self.model).get_compiled_call(self.stand_in, compile_config)

        @functools.wraps(compiled_call)
        def call(**inputs) -> Any:
            return self.stand_in(**inputs) if self.phase is Phase.IDLE else compiled_call(**inputs)

        return call

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args, **kwargs
    ) -> dict[str, Any]:
        """After an idle pass nothing has changed."""
        if self.phase is Phase.IDLE:
            return model_kwargs
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prefill(self, inputs: dict[str, Any], chunks: list[slice]) -> None:
        """As ever, and then idle passes, so that this rank has as many passes as any other."""
        tokens, passes = new_tokens(inputs), len(chunks) + 1  # the loop itself runs the last chunk
        most = torch.tensor(passes, dtype=torch.long, device=tokens.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        super()._prefill(inputs, chunks)
        for _ in range(int(most) - passes):
            self.stand_in(**self._idle_inputs(tokens), return_dict=True)

    def _idle_inputs(self, tokens: torch.Tensor) -> dict[str, Any]:
        """The model's inputs for an idle pass of as many rows as `tokens`: its output means nothing."""
        ids = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        inputs = {"input_ids": ids, self.stream.traits.cache_name: default_cache(self.model.config), "use_cache": True}
        return inputs if self.stream.traits.ordered else inputs | {"position_ids": torch.zeros_like(ids)}


class Drafter:
    """The assistant of assisted decoding, which drafts in a stream of its own, as long as that of the model.

    If that is the model itself, which exits early, so many of its first layers draft (`depth`), and the stream runs on
    the model `with_its_own_depth`.
    """

    def __init__(self, assistant: PreTrainedModel, window: Window, depth: Optional[int] = None, runs_on: Any = None):
        if "shared_kv_states" in inspect.signature(assistant.forward).parameters:
            raise ValueError(
                f"`assistant_model` ({type(assistant).__name__}) can't draft in a stream: it has no keys of its own, "
                "and reads those that the model keeps of all tokens. Use another one, or `prompt_lookup_num_tokens`."
            )
        self.runs_on = assistant if runs_on is None else runs_on
        self.cache = SinkCache(window.length, window.num_sinks, window.bits)
        try:
            self.cache.bind(assistant)
        except ValueError as error:
            raise ValueError(f"`assistant_model` can't draft in a stream of its own. {error}") from error
        stream = self.cache.held
        if depth is not None:
            names = ("rotations", "layouts", "factors")
            of_layers = {name: getattr(stream.traits, name) for name in names}
            traits = replace(stream.traits, **{name: each and each[:depth] for name, each in of_layers.items()})
            self.cache.held = Stream(window, traits)
        if not all(layer.can_record for layer in self.cache.layers):
            raise ValueError(
                f"`assistant_model` ({type(assistant).__name__}) can't draft: some of its layers can't take tokens "
                f"back with transformers {transformers.__version__}, as they slide or keep a state. Use another one."
            )
        self.cache.activate_past_recording()

    @property
    def stand_in(self) -> PreTrainedModel:
        """What transformers gets for the assistant. It holds this drafter, which does not hold it: both go at once."""
        stand_in = shared(self.runs_on)
        stand_in.generate = self.generate
        return stand_in

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, attention_mask: Optional[torch.Tensor] = None, **kwargs
    ) -> Any:
        """What the assistant says after `input_ids` (int64 `[1, tokens]`).

        What it drafted before and the model did not accept is known by its tokens, and taken back first.
        """
        cache, length = self.cache, input_ids.shape[1]
        padded = attention_mask is not None and attention_mask.shape[1] <= length  # else, of another tokenizer's ids
        mask = torch.ones_like(input_ids)  # given none, transformers would take a token that it pads with for padding
        mask[:, : int((attention_mask == 0).sum()) if padded else 0] = 0
        end = min(cache.held.common_length(input_ids), length - 1)
        if cache.held.can_end_at(end):
            cache.crop(max_length=end)
        else:
            cache.reset()
            cache.activate_past_recording()
        for name in (CACHE, "position_ids", "cache_position"):
            kwargs.pop(name, None)
        most = min(max_new_tokens, max(cache.window_length - 1, 1))  # what can be taken back
        if kwargs.get("min_new_tokens") is not None:
            kwargs["min_new_tokens"] = min(kwargs["min_new_tokens"], most)
        config = copied_with(kwargs["generation_config"], **SERVED)
        kwargs |= dict(input_ids=input_ids, attention_mask=mask, max_new_tokens=most, generation_config=config)
        output = StreamedCall(self.runs_on, cache).decode(type(self.runs_on).generate, kwargs)
        setattr(output, CACHE, None)  # transformers would crop it by its own count
        return output


def with_its_own_depth(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a configuration of its own for the base model, whose depth an early exit sets while it drafts."""
    prefix = model.base_model_prefix
    stand_in, base = shared(model), shared(getattr(model, prefix))
    base.config = copy.copy(base.config)
    vars(stand_in)["_modules"] = {**model._modules, prefix: base}
    return stand_in


# ---------------------------------------------------------------------------------------------------------------------
# generate
# ---------------------------------------------------------------------------------------------------------------------


def generate(
    *args,
    model: Optional[PreTrainedModel] = None,
    window_length: Optional[int] = None,
    num_sink_tokens: Optional[int] = None,
    prefill_progress: bool = False,
    kv_bits: Optional[int] = None,
    kept_conversations: Optional[int] = None,
    offload_kept_conversations: Optional[bool] = None,
    **kwargs,
) -> Any:
    """Generate without end in constant memory: `model.generate` with a `SinkCache`.

    By hand it is called as `generate(model, window_length, num_sink_tokens, prefill_progress, **kwargs)`. A model that
    was loaded from a repository with this file has it as its own `generate`, and takes the prompt first, as any model.

    transformers compiles the model's forward pass for single tokens where it does so with a `StaticCache`: on a GPU,
    and elsewhere if `compile_config` says so. One graph serves any stream. Nothing is compiled with `disable_compile`,
    with layers other than sink layers, with ALiBi, with flash attention, or for a model that can't be one graph.

    Args:
        args: by hand, `model` and the arguments after it; else what the `generate` of the model's class takes.
        model: a decoder-only model with relative positions (RoPE in at least some layers, recurrent states, or ALiBi).
            It may be in a wrapper of `torch.compile` or peft.
        window_length (`int`, defaults to that of the generation config, or 256): the most tokens kept in the cache,
            sinks included.
        num_sink_tokens (`int`, defaults to that of the generation config, or 4): how many of them are the first tokens
            of the sequence.
        kv_bits (`int`, defaults to that of the generation config, or None): 8 to keep the recent tokens' keys and
            values in 8 bits, each with a scale for each head. That takes about half the memory, so a window can be
            twice as long. By default they are kept as the model makes them.
        prefill_progress (`bool`, defaults to `False`): show a progress bar while a long prompt goes in.
        kept_conversations (`int`, defaults to that of the generation config, or 0): how many conversations are kept on
            the model between calls. A call without `cache` that begins with the tokens of one goes on in it, and reads
            only what is new. This is for servers and clients that send the whole conversation each time.
            `SinkCache.kept_nbytes(model)` tells how much memory they take, and `SinkCache.forget_kept(model)` frees it.
        offload_kept_conversations (`bool`, defaults to that of the generation config, or `False`): keep them in the
            memory of the CPU, so that a GPU holds only the window that is in use.
        kwargs: all that `model.generate` takes. These have a meaning of their own:
            cache (`SinkCache`), or by its older name `past_key_values`: continue in this cache. It has a window
                already, so another `window_length` is an error. Pass the whole conversation as `input_ids`, or only its
                new tokens and the `attention_mask` of all; and all its images or the like, or those of new tokens. A
                new, unbound cache is bound to `model`. No other call may use the cache until this one ends.
            prefill_chunk_size (`int`): the most tokens of a prompt in one forward pass. It changes time and memory, and
                no tokens. By default, the part of a prompt that the window holds goes in at once, and the rest by
                chunks of `3/4 * window_length / num_sink_tokens` tokens, at most 256; with ALiBi, token by token.
            assistant_model, prompt_lookup_num_tokens, assistant_early_exit: decode with drafts (arXiv:2211.17192). An
                assistant drafts in a window of its own, as long as the model's.

    Returns:
        What `model.generate` returns. With `return_dict_in_generate=True`, its `cache` (until transformers 5.23
        `past_key_values`) is the `SinkCache`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument, or the model, can't be served correctly.

        Both are raised before the first forward pass of the generation. What was passed is left as it was.
    """
    window = {"window_length": window_length, "num_sink_tokens": num_sink_tokens, "kv_bits": kv_bits}
    keeping = {"kept_conversations": kept_conversations, "offload_kept_conversations": offload_kept_conversations}
    if args:
        own = {"model": model, "prefill_progress": prefill_progress} | window | keeping
        return generate(**_by_name(args, own | kwargs))
    with adapters_of_rows(model):
        return _generate_by_name(model, prefill_progress, window, keeping, kwargs)


def _generate_by_name(
    model: Any, progress: bool, window: dict[str, Any], keeping: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """`generate`, when all its arguments have names: `window` and `keeping` have those about these, `kwargs` others."""
    refuse_other_code(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ABOUT_THE_CALL}
    cache, older = kwargs.pop(NEWER_NAME, None), kwargs.pop(OLDER_NAME, None)
    if cache is not None and older is not None:
        raise TypeError(f"`{OLDER_NAME}` and `{NEWER_NAME}` are two names of one argument. Leave one of them out.")
    cache = older if cache is None else cache
    model = unwrapped(model)
    loop = _generate_behind(model)
    part = _part_that_generates(model, loop)
    given = window | keeping | kwargs
    settings = {name: resolve_setting(model, given, name) for name in (*window, *keeping, "prefill_chunk_size")}
    if part is not None:
        kwargs = given | settings | (window if cache is not None else {})  # a cache that is given has its own
        return _generate_inside(model, part, loop, kwargs | {CACHE: cache, "prefill_progress": progress})
    refuse_arguments(model, kwargs)
    chunk_size = settings.pop("prefill_chunk_size")
    chunk_size = None if chunk_size is None else integer("prefill_chunk_size", chunk_size, least=1)
    kwargs.pop("prefill_chunk_size", None)
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copied_with(kwargs["generation_config"], **SERVED)
    around = vars(model).get("_streamed_call")  # set if a `generate` of the model's own asks for a stream in a stream
    if around is not None and cache is around.cache:
        return loop.__get__(model)(**{CACHE: cache}, **kwargs)
    model = model if around is None else around.cache._bound_model
    number, keeper = settings["kept_conversations"], None
    number = 0 if number is None else integer("kept_conversations", number, least=0, of="conversations")
    if cache is None:
        refuse_dropped_settings(model, [name for name, value in settings.items() if value is None])
        cache = SinkCache(**{name: settings[name] for name in window if settings[name] is not None})
        if number > 0:
            keeper = Keeper(model, number, bool(settings["offload_kept_conversations"]))
    else:
        refuse_cache(cache, window)
    with cache.in_use():
        return _generate(model, loop, cache, kwargs, chunk_size=chunk_size, progress=progress, keeper=keeper)


def _generate(model: PreTrainedModel, loop: Callable, cache: SinkCache, kwargs: dict[str, Any], **settings) -> Any:
    """`generate` of a model without wrappers, in a cache that is in use by this call alone, bound or not.

    Args:
        loop: the `generate` that the stream goes on in, not bound to the model. It takes `kwargs`.
        settings: of the `StreamedCall`.
    """
    if cache.is_bound:
        cache.held.settle()
    if loop.__module__.startswith("transformers.generation"):  # a model's own may hand on other arguments
        if cache.is_bound:
            cache.held.end_in_common(kwargs)
        else:
            refuse_gap(kwargs, seen=0, end=0)
    window, assistance = cache.held.window, assisted_by(model, kwargs)
    if assistance is not None:
        stream = SinkCache(window.length, window.num_sinks, window.bits).bind(model).held
        refuse_assistance(model, stream, kwargs, assistance)
    if kwargs.get("assistant_model") is not None:
        assistant = unwrapped(kwargs["assistant_model"], "assistant_model")
        kwargs["assistant_model"] = Drafter(assistant, window).stand_in
    cache.bind(model)
    call_class = SyncedCall if is_synced(model, kwargs.get("synced_gpus")) else StreamedCall
    depth = resolve_setting(model, kwargs, "assistant_early_exit")
    runs_on = with_its_own_depth(model) if depth else model
    call = call_class(runs_on, cache, assisted=assistance is not None, **settings)
    if depth:  # transformers has the model itself draft
        call.stand_in.generate = Drafter(model, window, depth, runs_on).generate
    return call.decode(loop, kwargs)


def _generate_behind(model: PreTrainedModel) -> Callable:
    """Find the next `generate` of the model's class and its bases that is not on the call stack yet.

    A class may have a `generate` of its own, which calls that of the class behind it, and at last that of transformers.
    Where `custom_generate`, or such a `generate` by itself, led here, those on the stack have begun, and the one behind
    them follows. By hand, and where this file came with the model, the first of all follows. What is set on the model
    alone is passed over: it may hold this function. The `generate` that is returned is not bound to the model.
    """
    bases = type(model).__mro__
    bases = bases[: bases.index(transformers.GenerationMixin) + 1]  # whose `generate` calls nothing behind it
    classes = [cls for cls in bases if "generate" in vars(cls)]
    codes = [getattr(inspect.unwrap(vars(cls)["generate"]), "__code__", None) for cls in classes]
    caller = frame = inspect.currentframe().f_back.f_back.f_back  # of `generate`
    frames = []
    # Frames behind a loop of transformers belong to another generation, from which, say, a logits processor calls this.
    while frame is not None and (frame is caller or frame.f_code is not codes[-1]):
        frames.append(frame)
        frame = frame.f_back
    begun = 0
    for frame in reversed(frames):
        if frame.f_code in codes[begun:] and _first_argument(frame) is model:
            begun = codes.index(frame.f_code, begun) + 1
    if begun == len(classes):  # transformers' own, which calls functions for `custom_generate` under its decorators
        return inspect.unwrap(vars(classes[-1])["generate"])
    return vars(classes[begun])["generate"]


def _part_that_generates(model: PreTrainedModel, loop: Callable) -> Optional[str]:
    """The name of the module whose `generate` the model's own, `loop`, calls for tokens, as in BLIP-2; else None."""
    names = getattr(getattr(inspect.unwrap(loop), "__code__", None), "co_names", ())
    if "generate" not in names or "super" in names or loop.__module__.startswith("transformers.generation"):
        return None
    generating = (PreTrainedModel, transformers.GenerationMixin)
    parts = [name for name in names if all(isinstance(model._modules.get(name), each) for each in generating)]
    return parts[0] if len(parts) == 1 else None


def _generate_inside(model: PreTrainedModel, part: str, loop: Callable, kwargs: dict[str, Any]) -> Any:
    """Run `loop`, the model's own `generate`, and stream in its `part`, as by the argument `custom_generate`.

    The `loop` hands `kwargs`, but for those that are None, on to the `generate` of the part.
    """
    stand_in, inner = shared(model), shared(model._modules[part])
    vars(inner)["generate"] = functools.partial(generate, model=model._modules[part])
    vars(stand_in)["_modules"] = {**model._modules, part: inner}
    return loop.__get__(stand_in)(**{name: value for name, value in kwargs.items() if value is not None})


def _first_argument(frame: Any) -> Any:
    """The first argument that the function of a frame was called with; None if it takes none."""
    value = next((frame.f_locals.get(name) for name in frame.f_code.co_varnames), None)
    return value[0] if isinstance(value, tuple) and value else value


def _by_name(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `generate` by name: `args` came by position, and `kwargs` have the defaults too.

    Raises:
        TypeError: there are too many `args`, or one of them also came by name; or transformers calls this function as a
            decoding loop, because it was passed as `custom_generate`.
    """
    if kwargs["model"] is not None:
        # Those of its own `generate`, or of transformers' if that takes `*args`.
        functions = type(unwrapped(kwargs["model"])).generate, transformers.GenerationMixin.generate
        takes = [inspect.getfullargspec(inspect.unwrap(function)) for function in functions]
        names = next(each.args[1:] for each in takes if each.varargs is None)
    elif len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].dim() > 0:
        raise TypeError(
            "`custom_generate` must be the name or the folder of this repository, not its function `generate`: "
            "transformers takes a function for a decoding loop, and hands it a prompt and a cache already made. Call "
            "the function by hand with the prompt by name, `generate(model, window_length, input_ids=...)`."
        )
    else:
        names = ("model", "window_length", "num_sink_tokens", "prefill_progress")
    if len(args) > len(names):
        raise TypeError(f"`generate` takes {len(names)} arguments by position ({', '.join(names)}), got {len(args)}.")
    named = dict(zip(names, args))
    for name in named:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise TypeError(f"`{name}` was given twice, by position and by name. Leave one of them out.")
    return kwargs | named
