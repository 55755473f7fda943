"""Keys don't wear out: however long a stream is, a key is rounded at most twice after the model made it."""

import itertools

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache
from tests.support.helpers import seeded, small_model

pytestmark = pytest.mark.newest_only

WINDOW, SINKS, HEAD_DIM = 1024, 4, 16
ROUNDING = 2**-8  # bfloat16 has 8 significant bits


def turned(keys: torch.Tensor, distances: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Float64 keys `[seq, head_dim]` turned by `distances` (`[seq]`) positions, by the definition of RoPE."""
    cos, sin = (function(distances[:, None].double() * frequencies) for function in (torch.cos, torch.sin))
    first, second = keys.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def error(stored: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of a key (`[seq, head_dim]`), relative to its length."""
    return float(((stored.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def assert_rounded_once(stored: torch.Tensor, exact: torch.Tensor) -> None:
    """Each number of `stored` is a bfloat16 next to that of `exact`, which float32 found to a millionth of its key."""
    slack = 1e-6 * exact.norm(dim=-1, keepdim=True)
    assert ((stored.double() - exact).abs() <= ROUNDING * exact.abs() + slack).all()


@pytest.mark.slow
def test_100_000_evictions_in_bfloat16(capsys):
    model = small_model(num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=8192).bfloat16()
    frequencies = model.model.rotary_emb.inv_freq.double()  # the model's own: casting it rounded them too
    cache = SinkCache(WINDOW, SINKS).bind(model)
    total = WINDOW + 100_000
    with seeded():
        raw = torch.randn(total, HEAD_DIM, dtype=torch.float64)
    made = torch.empty(total, HEAD_DIM, dtype=torch.bfloat16)  # what a bfloat16 model caches: the first rounding
    made_at = torch.empty(total, dtype=torch.long)
    worst, looks, shifts_back, due = 0.0, 0, 0, False
    seen, lengths = 0, itertools.cycle([1, 63])  # one by one takes ten times as long
    while seen < total:
        new = slice(seen, min(seen + next(lengths), total))
        length, token = new.stop - seen, new.stop - 1
        made_at[new] = cache.prepare_inputs(torch.ones(1, length, dtype=torch.long))["position_ids"]
        shifted_back = seen > 0 and bool(made_at[seen] <= made_at[seen - 1])
        shifts_back += shifted_back
        made[new] = turned(raw[new], made_at[new], frequencies)
        cache.update(made[None, None, new], made[None, None, new], 0)
        due |= shifted_back or token // 10_000 > (seen - 1) // 10_000 or new.stop == total
        seen = new.stop
        if token < WINDOW or length > 1 or not due:  # the sinks are moved in their slots for one token alone
            continue
        looks, due = looks + 1, False
        kept = torch.cat([torch.arange(SINKS), torch.arange(token - (WINDOW - SINKS) + 1, token + 1)])
        slots = torch.where(kept < SINKS, kept, SINKS + (kept - SINKS) % (WINDOW - SINKS))
        keys = cache.layers[0].keys[0, 0, slots]
        # As the model was told last: the window ends at the new token, and the sinks are right before it.
        positions = torch.arange(WINDOW) + int(made_at[token]) - WINDOW + 1
        worst = max(worst, error(keys, turned(raw[kept], positions, frequencies)))
        assert_rounded_once(keys, turned(made[kept], positions - made_at[kept], frequencies))

    old = old_rotation_error(raw, frequencies)
    with capsys.disabled():
        print(
            f"\nlargest relative error of a bfloat16 key, window {WINDOW}, {total - WINDOW:,} evictions, {shifts_back} "
            f"shifts back, {looks} looks: {worst:.2%}"
            f"\n(two roundings: {2 * ROUNDING:.2%}; the old rotation, after one window: {old:.2%})"
        )
    assert looks >= 20 and shifts_back >= 10
    assert worst <= 2 * ROUNDING * (1 + ROUNDING)
    assert old > 10 * worst


def old_rotation_error(raw: torch.Tensor, frequencies: torch.Tensor) -> float:
    """The same keys in an unbound cache, at the window's positions, with cos and sin in bfloat16 as from a model."""
    cache = SinkCache(WINDOW, SINKS)
    for token in range(2 * WINDOW):
        place = torch.tensor([min(token, WINDOW - 1)])
        made = turned(raw[token : token + 1], place, frequencies).bfloat16()[None, None]
        angles = torch.cat([torch.tensor([token]).double()[:, None] * frequencies] * 2, dim=-1)[None]
        keys, _ = cache.update(made, made, 0, {"cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16()})
    window = torch.arange(WINDOW + SINKS, 2 * WINDOW)
    return error(keys[0, 0, SINKS:], turned(raw[window], window - WINDOW, frequencies))


def test_an_update_moves_nothing_but_the_sinks():
    model = small_model().bfloat16()
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        for token in range(40):
            before = [keys.clone() for keys in cache.key_cache] if token > 16 else None
            model(input_ids=torch.tensor([[token + 2]]), **{CACHE: cache})
            if before:
                for old, new in zip(before, cache.key_cache):
                    changed = (old != new).any(dim=-1).any(dim=1)[0].nonzero().flatten().tolist()
                    assert changed == [0, 1, 2, 3, 4 + (token - 4) % 12]
