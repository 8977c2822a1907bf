"""The engine that a server is given."""

from __future__ import annotations

import gc

from assay.cli.serve import built
from assay.engine.config import EngineConfig
from assay.engine.sides import Setup
from assay.engine.storage import Storage
from tests.server.live import tiny, words


def test_no_collection_goes_through_what_was_loaded() -> None:
    setup = Setup(EngineConfig(max_running=2, tokens=64))
    try:
        engine = built(lambda: (tiny(), words()), setup, lambda model: Storage(), False)
        left = {id(one) for one in gc.get_objects()}
        assert not {id(engine), id(engine.runner.model.blocks), id(engine.tokenizer)} & left
    finally:
        gc.unfreeze()
    assert {id(engine), id(engine.runner.model.blocks), id(engine.tokenizer)} <= {id(one) for one in gc.get_objects()}
