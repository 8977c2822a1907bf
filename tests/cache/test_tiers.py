"""Every tier: what comes back is what went in, damage is found, the bound holds and the one unused for longest goes."""

from __future__ import annotations

import json
import pickle
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from assay.cache.tiers import DiskTier, FsspecTier, MemoryTier, RedisTier, Scope, Tier
from assay.cache.tiers.record import pack, unpack
from tests.cache.tiers import SHAPES, name, record, redis_server, same

SIZE = len(pack(name(0), record(0)))
Make = Callable[[int], Tier]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


def maker(kind: str, folder: Path, request: pytest.FixtureRequest) -> Make:
    if kind == "redis":
        url = request.getfixturevalue("redis_url")
        return lambda bound: RedisTier(url, bound, "{" + uuid.uuid4().hex + "}")
    return {
        "memory": MemoryTier,
        "disk": lambda bound: DiskTier(folder / uuid.uuid4().hex, bound),
        "fsspec": lambda bound: FsspecTier(f"memory://{uuid.uuid4().hex}", bound),
    }[kind]


@pytest.fixture(params=["memory", "disk", "fsspec", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    return maker(request.param, tmp_path, request)


def test_what_comes_back_is_what_went_in(make: Make) -> None:
    tier = make(10 * SIZE)
    assert tier.get(name(1), SHAPES) is None
    for number in (1, 2, 1):
        tier.put(name(number), record(number))
    assert same(tier.get(name(1), SHAPES), 1) and same(tier.get(name(2), SHAPES), 2)
    assert tier.held() == 2 * SIZE
    expected = {"hits": 2, "misses": 1, "puts": 2, "bytes_read": 2 * SIZE, "bytes_written": 2 * SIZE}
    assert tier.stats() == dict.fromkeys(tier.stats(), 0) | expected
    tier.close()


def test_the_one_unused_for_longest_goes(make: Make) -> None:
    tier = make(3 * SIZE + SIZE // 2)
    for number in (1, 2, 3):
        tier.put(name(number), record(number))
    assert same(tier.get(name(1), SHAPES), 1)
    tier.put(name(4), record(4))
    assert tier.get(name(2), SHAPES) is None and tier.held() == 3 * SIZE
    assert all(same(tier.get(name(n), SHAPES), n) for n in (1, 3, 4))
    tier.put(name(5), {"k": torch.zeros(4 * SIZE)})
    assert tier.stats()["refused"] == 1 and tier.stats()["evicted"] == 1 and tier.held() == 3 * SIZE


def test_a_record_under_another_name_is_damage(make: Make) -> None:
    """The store itself moved or changed it; afterwards it can be stored again."""
    tier = make(10 * SIZE)
    tier._write(name(1), pack(name(2), record(2)))
    assert tier.get(name(1), SHAPES) is None and tier.stats()["damaged"] == 1
    assert tier.held() == 0
    tier.put(name(1), record(1))
    assert same(tier.get(name(1), SHAPES), 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=25), room=st.integers(1, 4))
@pytest.mark.parametrize("kind", ["memory", "disk", "redis"])
def test_as_an_ordered_dict(
    kind: str, calls: list[tuple[bool, int]], room: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tier, expected = maker(kind, tmp_path, request)(room * SIZE), OrderedDict[int, None]()
    for reading, number in calls:
        if reading:
            found = tier.get(name(number), SHAPES)
            assert same(found, number) if number in expected else found is None
            if number in expected:
                expected.move_to_end(number)
        elif number not in expected:
            tier.put(name(number), record(number))
            expected[number] = None
            if len(expected) > room:
                expected.popitem(last=False)
        assert tier.held() == len(expected) * SIZE
    assert {n for n in range(7) if tier._has(name(n))} == set(expected)


def changed(what: str) -> bytes:
    """A record of number 1 with one thing wrong."""
    blob = pack(name(1), record(1))
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    if what == "bit":
        return blob[:-3] + bytes([blob[-3] ^ 1]) + blob[-2:]
    if what == "pickle":
        return pickle.dumps(record(1))
    if what == "shape":
        return pack(name(1), record(1) | {"k": record(1)["k"].view(2, 4, 3)})
    if what == "dtype":
        return pack(name(1), record(1) | {"k": record(1)["k"].to(torch.int32)})
    if what == "missing":
        return pack(name(1), {k: v for k, v in record(1).items() if k != "half"})
    if what == "version":
        return save(record(1), header | {"assay": "0"})
    if what == "swapped":
        return save(record(1) | {"k": record(2)["k"]}, header)
    return save(record(1))


@pytest.mark.parametrize("what", ["bit", "pickle", "shape", "dtype", "missing", "version", "swapped", "bare"])
def test_damage_is_named(what: str) -> None:
    assert same(unpack(pack(name(1), record(1)), name(1), SHAPES), 1)
    with pytest.raises(ValueError, match=r"safetensors|it says|its tensors|its content"):
        unpack(changed(what), name(1), SHAPES)


def test_cut_short_anywhere() -> None:
    blob = pack(name(1), record(1))
    for length in range(len(blob)):
        with pytest.raises(ValueError, match="no safetensors file"):
            unpack(blob[:length], name(1), SHAPES)


def test_a_record_is_an_ordinary_safetensors_file() -> None:
    assert same(load(pack(name(3), record(3))), 3)


def test_a_name_says_everything() -> None:
    base: dict[str, Any] = {"model": "m", "page": 16, "formats": "f"}
    calls: list[tuple[dict[str, Any], tuple[Any, ...]]] = [(base, ("page", b"c", b"k"))]
    calls += [(base | change, ("page", b"c", b"k")) for change in ({"model": "n"}, {"page": 8}, {"formats": ""})]
    calls += [(base, args) for args in (("snap", b"c", b"k"), ("page", b"d", b"k"), ("page", b"c", b""))]
    calls += [
        (base, ("page", b"ck", b"")),
        (base, ("pagec", b"", b"k")),
        (base | {"model": "mf", "formats": ""}, ("page", b"c", b"k")),
    ]
    names = [Scope(**scope).name(*args) for scope, args in calls]
    assert len(set(names)) == len(names) and all(len(n) == 64 for n in names)
    assert Scope(**base).name("page", b"c", b"k") == names[0]


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes is 0"):
        MemoryTier(0)


def test_a_server_that_is_gone_is_absence(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="the redis client is not installed: pip install 'assay[store]'")
    tier = RedisTier(f"unix://{tmp_path}/nobody", SIZE)
    tier.put(name(1), record(1))
    assert tier.get(name(1), SHAPES) is None
    assert tier.stats()["failed"] == 2 and tier.stats()["misses"] == 1


def test_records_that_the_server_evicted_are_forgotten(redis_url: str) -> None:
    tier = RedisTier(redis_url, 3 * SIZE, "{evicted}")
    for number in (1, 2):
        tier.put(name(number), record(number))
    tier.server.delete(f"{{evicted}}:record:{name(1)}")
    assert tier.get(name(1), SHAPES) is None and tier.held() == SIZE


def test_two_clients_share_a_server(redis_url: str) -> None:
    """One writes, another reads and evicts; the bound is of both together."""
    first, second = (RedisTier(redis_url, 2 * SIZE, "{shared}") for _ in range(2))
    first.put(name(1), record(1))
    assert same(second.get(name(1), SHAPES), 1)
    for number in (2, 3):
        second.put(name(number), record(number))
    assert first.get(name(1), SHAPES) is None and first.held() == second.held() == 2 * SIZE
