"""Simulated shops with the structure that CAFE looks for, at the size of real ones. They show how things work, not how well.

What is planted:
- intents: a user has three favourite intents (drawn by Zipf popularity); at each step she stays in the intent (probability
  STAY), moves along a sparse directed graph of intents (FOLLOW), or returns to a favourite;
- items: each belongs to one intent, more to the busier intents, and has a place in it. Staying in an intent, the next item is
  a close successor of the last one with probability NEAR; otherwise it is drawn by Zipf popularity within the intent;
- counts: interactions, users, items and intents are exactly the preset's; every item and every intent occurs.
"""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cafe.data.folders import write_atomically

STAY, FOLLOW, NEAR, NEIGHBOURS, REACH = 0.65, 0.25, 0.6, 4, 3
THINGS = ["camping", "kitchen", "garden", "bath", "office", "music", "games", "baby", "pets", "car"]
KINDS = ["tools", "lights", "storage", "care", "covers", "sets", "spares", "gifts"]


@dataclass(frozen=True)
class Shop:
    """Exact counts of a simulated shop. The last two presets are Table 1 of the paper."""

    interactions: int
    items: int
    intents: int
    users: int
    parquet: bool = False


PRESETS = {
    "demo": Shop(24_000, 7_000, 80, 3_000),
    "sparse": Shop(29_291, 9_242, 193, 3_369),
    "amazon": Shop(5_370_171, 1_910_226, 1_392, 131_248, parquet=True),
    "tmall": Shop(14_460_516, 1_788_758, 9_999, 131_086, parquet=True),
}


def simulate(preset: str, out: str | Path, seed: int = 0) -> dict[str, Path]:
    """Writes the interactions (user, item, timestamp) and items (item, intent) of a preset into the folder `out`.

    The same preset and seed give the same bytes.

    Returns:
        {"interactions": path, "items": path}; gzipped CSV, or Parquet for the large presets.

    Raises:
        ValueError: no such preset.
        OSError: the disk is full or may not be written; what was in `out` is still there.

    Example:
        >>> import tempfile
        >>> simulate("demo", tempfile.mkdtemp())["items"].name
        'items.csv.gz'
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    shop = PRESETS[preset]
    user, item, item_intent = draw(shop, seed)
    if preset == "demo":
        intent_ids = pl.Series([f"{thing} {kind}" for thing in THINGS for kind in KINDS])
    else:
        intent_ids = pl.Series([f"c{number}" for number in range(shop.intents)])
    intents = intent_ids.gather(item_intent)
    place = pl.Series(np.arange(shop.items) - np.searchsorted(item_intent, item_intent))
    items = pl.DataFrame({"intent": intents, "place": place}).select(
        pl.format("{}-{}", pl.col("intent").str.replace_all(" ", "-"), pl.col("place")).alias("item"), "intent"
    )
    start = np.random.default_rng([seed, 1]).integers(1_600_000_000, 1_700_000_000, shop.users)
    interactions = pl.DataFrame(
        {
            "user": pl.select(pl.format("u{}", pl.lit(pl.Series(user)))).to_series(),
            "item": items["item"].gather(item),
            "timestamp": start[user] + 3600 * np.arange(len(user)),
        }
    )
    folder, suffix = Path(out), ".parquet" if shop.parquet else ".csv.gz"
    folder.mkdir(parents=True, exist_ok=True)
    frames = {"interactions": interactions, "items": items}
    paths = {name: folder / f"{name}{suffix}" for name in frames}
    write_atomically({paths[name]: [_bytes(frame, shop.parquet)] for name, frame in frames.items()})
    return paths


def draw(shop: Shop, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interactions, user by user in time order, and the catalog.

    Returns:
        user, item: int64 (interactions); item_intent: int64 (items), ascending.
    """
    rng = np.random.default_rng(seed)
    lengths = _lengths(rng, shop)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    by_length = np.argsort(-lengths, kind="stable")  # so that the users still active at a step are a prefix
    active = np.searchsorted(-lengths[by_length], -np.arange(lengths.max()), side="left")  # users longer than t
    intent = np.empty(shop.interactions, np.int64)
    graph = rng.integers(shop.intents, size=(shop.intents, NEIGHBOURS))
    favourites = _zipf(rng, np.full((shop.users, 3), shop.intents))
    current = rng.permutation(np.arange(shop.users) % shop.intents)  # every intent begins somebody's history
    for t, count in enumerate(active):
        users = by_length[:count]
        if t:
            now = current[users]
            follow = graph[now, rng.integers(NEIGHBOURS, size=count)]
            back = favourites[users, rng.integers(3, size=count)]
            u = rng.random(count)
            current[users] = np.where(u < STAY, now, np.where(u < STAY + FOLLOW, follow, back))
        intent[indptr[users] + t] = current[users]

    size = _shares(np.bincount(intent, minlength=shop.intents), shop.items)
    first = np.concatenate([[0], np.cumsum(size)[:-1]])
    item = np.empty(shop.interactions, np.int64)
    place = np.zeros(shop.users, np.int64)
    for t, count in enumerate(active):
        users = by_length[:count]
        at = indptr[users] + t
        sizes = size[intent[at]]
        fresh = _zipf(rng, sizes)
        if t:
            near = (place[users] + rng.integers(1, REACH + 1, count)) % sizes
            fresh = np.where((intent[at] == intent[at - 1]) & (rng.random(count) < NEAR), near, fresh)
        place[users] = fresh
        item[at] = first[intent[at]] + fresh
    item_intent = np.repeat(np.arange(shop.intents), size)
    _cover(rng, item, intent, item_intent)
    return np.repeat(np.arange(shop.users), lengths), item, item_intent


def _lengths(rng: np.random.Generator, shop: Shop) -> np.ndarray:
    """Log-normal lengths of at least 3 that add up to the interactions."""
    raw = rng.lognormal(0.0, 0.8, shop.users)
    return 3 + _round_to(raw * (shop.interactions - 3 * shop.users) / raw.sum(), shop.interactions - 3 * shop.users)


def _round_to(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers next to `shares` that add up to `total` (largest remainders)."""
    whole = np.floor(shares).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: total - whole.sum()]] += 1
    return whole


def _shares(counts: np.ndarray, items: int) -> np.ndarray:
    """How many of `items` each intent has: 1 to its count of interactions, in proportion to them."""
    return 1 + _round_to((counts - 1) * (items - len(counts)) / (counts - 1).sum(), items - len(counts))


def _zipf(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """A rank below each size, P(rank) about 1 / (rank + 1)."""
    return np.minimum((np.exp(rng.random(sizes.shape) * np.log(sizes + 1.0)) - 1).astype(np.int64), sizes - 1)


def _cover(rng: np.random.Generator, item: np.ndarray, intent: np.ndarray, item_intent: np.ndarray) -> None:
    """Gives every item that was never drawn the place of a repeated one of its intent, in place."""
    order = rng.permutation(len(item))
    _, first = np.unique(item[order], return_index=True)
    repeated = np.ones(len(item), bool)
    repeated[order[first]] = False
    spare = order[repeated[order]]
    spare = spare[np.argsort(intent[spare], kind="stable")]
    unseen = np.flatnonzero(np.bincount(item, minlength=len(item_intent)) == 0)
    spare_start = np.searchsorted(intent[spare], item_intent[unseen])
    within = np.arange(len(unseen)) - np.searchsorted(item_intent[unseen], item_intent[unseen])
    item[spare[spare_start + within]] = unseen


def _bytes(frame: pl.DataFrame, parquet: bool) -> bytes:
    buffer = io.BytesIO()
    if parquet:
        frame.write_parquet(buffer)
        return buffer.getvalue()
    frame.write_csv(buffer)
    return gzip.compress(buffer.getvalue(), mtime=0)
