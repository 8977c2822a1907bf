"""Pages that memory no longer has come back from tiers: to an empty cache, in another process, after damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from assay.cache import Paged, PageSize, Slot
from assay.cache.backing import Backing
from assay.cache.coded import Quantised
from assay.cache.formats import Formats
from assay.cache.tiers import DiskTier, MemoryTier, Tiers
from assay.model.lm import LM, state_table
from assay.ops.step import rows_step
from tests.cache.models import model, tokens

SIZE = PageSize(2, 4, 12, 8, tails=6, snapshots=4)
KINDS = [("full", "full"), ("full", "window"), ("full", "linear"), ("window", "linear"), ("linear", "linear")]
KEY = b"tenant"


def cache_of(lm: LM, backing: Backing, quantised: bool = False, size: PageSize = SIZE) -> Paged:
    fields = state_table(lm.spec)
    if quantised:
        rules = Formats({"*.k": "int8/channel", "*.v": "int8/token"}, 3)
        return Quantised(fields, size, torch.float64, formats=rules, backing=backing)
    return Paged(fields, size, torch.float64, backing=backing)


@torch.no_grad()
def serve(lm: LM, store: Paged, text: Tensor, key: bytes = KEY) -> tuple[int, Tensor]:
    """Answer one prompt [T] in chunks that end at borders and close; tokens that were stored, and the last logits."""
    slot: Slot = store.open(text.tolist(), key)
    reused = at = store.length(slot)
    while at < len(text):
        end = min(len(text), at + 4)
        step = rows_step(text[None, at:end], at, horizon=64)
        out = lm(step, store.begin([slot], step)).logits
        assert out is not None
        store.settle([slot])
        store.check_integrity()
        at = end
    store.close(slot)
    store.check_integrity()
    if store.backing is not None:
        store.backing.tiers.flush()
    return reused, out[-1]


@pytest.mark.parametrize(
    ("kinds", "quantised"),
    [*((kinds, False) for kinds in KINDS), *((kinds, True) for kinds in KINDS if "full" in kinds)],
)
def test_an_empty_cache_starts_from_the_tier(kinds: tuple[str, ...], quantised: bool, tmp_path: Path) -> None:
    """The second cache has nothing in memory, and answers as the first would from memory; recurrent states travel."""
    lm, text = model(kinds), tokens(1, 23)[0]
    first = cache_of(lm, Backing(Tiers([DiskTier(tmp_path / "t", 10**7)]), "m"), quantised)
    cold, expected = serve(lm, first, text)
    warm, again = serve(lm, first, text)
    other = cache_of(lm, Backing(Tiers([MemoryTier(10**6), DiskTier(tmp_path / "t", 10**7)]), "m"), quantised)
    reused, got = serve(lm, other, text)
    assert (cold, warm, reused) == (0, 20, 20)
    assert torch.equal(got, again) if quantised else float((got - expected).abs().max()) < 1e-6
    assert other.backing is not None
    assert (other.backing.fetched > 0) == (kinds != ("linear", "linear")) and other.backing.snapshots == (
        "linear" in kinds
    )
    assert other.counts.hit_tokens == 20
    assert serve(lm, other, text)[0] == 20 and serve(lm, other, text, b"another")[0] == 0


def test_what_memory_evicted_comes_back() -> None:
    """Room for three texts of five pages in tiers, for two in memory: without tiers the first is lost."""
    lm, texts = model(("full", "full")), [tokens(1, 23, seed)[0] for seed in range(4)]
    backing = Backing(Tiers([MemoryTier(10**7)]), "m")
    plain, backed = Paged(state_table(lm.spec), SIZE, torch.float64), cache_of(lm, backing)
    for store, expected in ((plain, 0), (backed, 20)):
        for text in texts:
            serve(lm, store, text)
        assert serve(lm, store, texts[0])[0] == expected
    assert backing.fetched == 5 and backed.counts.hits == 1
    reused, got = serve(lm, backed, torch.cat([texts[1][:13], texts[2][:6]]))
    fresh = serve(lm, Paged(state_table(lm.spec), SIZE, torch.float64), torch.cat([texts[1][:13], texts[2][:6]]))[1]
    assert reused == 12 and float((got - fresh).abs().max()) < 1e-12


def test_damage_costs_its_page_and_those_behind(tmp_path: Path) -> None:
    lm, text = model(("full", "full")), tokens(1, 23)[0]
    folder = DiskTier(tmp_path / "t", 10**7)
    expected = serve(lm, cache_of(lm, Backing(Tiers([folder]), "m")), text)[1]
    oldest = sorted(folder.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    blob = bytearray(oldest[2].read_bytes())
    blob[-1] ^= 1
    oldest[2].write_bytes(blob)
    again = cache_of(lm, Backing(Tiers([DiskTier(tmp_path / "t", 10**7)]), "m"))
    reused, got = serve(lm, again, text)
    assert reused == 8 and float((got - expected).abs().max()) < 1e-12
    assert again.backing is not None and again.backing.tiers.levels[0].stats()["damaged"] == 1


def test_other_models_pages_and_formats_are_not_found(tmp_path: Path) -> None:
    lm, text, tier = model(("full", "full")), tokens(1, 23)[0], DiskTier(tmp_path / "t", 10**7)
    serve(lm, cache_of(lm, Backing(Tiers([tier]), "m")), text)
    for name, quantised, size in (("other", False, SIZE), ("m", True, SIZE), ("m", False, PageSize(2, 2, 24, 8))):
        assert serve(lm, cache_of(lm, Backing(Tiers([tier]), name), quantised, size), text)[0] == 0
    half = model.__wrapped__(("full", "full")).float()
    assert (
        serve(half, Paged(state_table(lm.spec), SIZE, torch.float32, backing=Backing(Tiers([tier]), "m")), text)[0] == 0
    )
    assert tier.stats()["damaged"] == 0, "nobody takes another's records for damage"


def test_a_full_memory_takes_what_fits() -> None:
    """Other sequences hold all pages but three: no more are fetched, and none of theirs is touched."""
    lm, text, backing = model(("full", "full")), tokens(1, 23)[0], Backing(Tiers([MemoryTier(10**7)]), "m")
    serve(lm, cache_of(lm, backing), text)
    store = cache_of(lm, backing)
    holder = store.open()
    for at in range(0, 36, 4):
        step = rows_step(tokens(1, 36, 9)[:, at : at + 4], at, horizon=64)
        lm(step, store.begin([holder], step))
    slot = store.open(text.tolist(), KEY)
    store.check_integrity()
    assert store.length(slot) == 12 and backing.fetched == 3


def test_another_process_starts_from_what_the_first_stored(tmp_path: Path) -> None:
    lm, text = model(("full", "linear")), tokens(1, 23)[0]

    def backed() -> Paged:
        return cache_of(lm, Backing(Tiers([DiskTier(tmp_path / "t", 10**7)]), "m"))

    child = os.fork()
    if child == 0:
        try:
            serve(lm, backed(), text)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert serve(lm, backed(), text)[0] == 20
