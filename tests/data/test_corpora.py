"""Corpora: the split by name, laziness, digests, and what is refused."""

import hashlib
import itertools
import json
import sysconfig
from pathlib import Path

import pytest

from assay.data.corpora import STDLIB_SKIPS, Corpus, CorpusSpec, Documents, open_corpus, split


def write(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_stdlib_is_the_sources_split_by_a_hash_of_the_path() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    corpus = open_corpus(CorpusSpec())
    for part, is_valid in ((corpus.train, False), (corpus.valid, True)):
        assert list(part.names) == sorted(part.names)
        for name in part.names:
            assert (int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 10 == 0) == is_valid
            assert not STDLIB_SKIPS & set(Path(name).parts)
    assert corpus.train[0].encode() == (root / corpus.train.names[0]).read_bytes()
    assert "json/decoder.py" in {*corpus.train.names, *corpus.valid.names}
    assert not {*corpus.train.names} & {*corpus.valid.names}
    size = sum(len(text) for part in (corpus.train, corpus.valid) for text in part)
    assert size > 5_000_000


def test_a_source_is_read_in_the_encoding_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, **{"a.py": b"# coding: latin-1\n# caf\xe9\n", "b.py": "# café\n", "_sysconfigdata_x.py": "x"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = open_corpus(CorpusSpec(valid_one_in=0))
    assert list(corpus.train) == ["# coding: latin-1\n# café\n", "# café\n"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no Python sources"):
        open_corpus(CorpusSpec())


def test_generated_text_is_pinned() -> None:
    """Recipes and golden curves stand on this text: a change of the grammar is a change of every one of them."""
    corpus = open_corpus(CorpusSpec(kind="generated", documents=20, document_bytes=300))
    assert corpus.digest == GENERATED
    assert corpus.train[0].startswith("why do amos and ruth watch every letter?\n")
    assert all(text.isascii() and 300 <= len(text) < 400 for text in corpus.train)
    assert open_corpus(CorpusSpec(kind="generated", documents=20, document_bytes=300, seed=1)).digest != GENERATED


def test_digest_is_over_names_and_texts() -> None:
    documents = Documents.of(["one", "two"], ["a", "b"])
    inner = b"".join(hashlib.sha256(part).digest() for part in (b"a", b"one", b"b", b"two"))
    assert documents.digest == hashlib.sha256(inner).hexdigest()
    others = [(["one", "twp"], ["a", "b"]), (["one", "two"], ["a", "c"]), (["onet", "wo"], ["a", "b"])]
    assert len({documents.digest, *(Documents.of(*other).digest for other in others)}) == 4
    swapped = Corpus(Documents.of(["two"]), Documents.of(["one"]))
    assert swapped.digest != Corpus(Documents.of(["one"]), Documents.of(["two"])).digest


def test_documents_are_read_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, a="first", b="second")
    corpus = open_corpus(CorpusSpec(kind="text", path=str(tmp_path), valid_one_in=0))
    write(tmp_path, a="changed")
    assert corpus.train[0] == "changed"
    with pytest.raises(IndexError):
        corpus.train[2]
    assert corpus.train[-1] == "second"


def test_text_from_a_folder_a_glob_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path, **{"b.txt": "B", "a.md": "A", ".hidden": "H"})
    write(tmp_path / "in", **{"c.txt": "C\r\n"})
    spec = CorpusSpec(kind="text", path=str(tmp_path), valid_one_in=0)
    assert dict(zip(*(open_corpus(spec).train.names, open_corpus(spec).train))) == {
        "a.md": "A",
        "b.txt": "B",
        "in/c.txt": "C\r\n",
    }
    globbed = open_corpus(CorpusSpec(kind="text", path=str(tmp_path / "**" / "*.txt"), valid_one_in=0)).train
    assert globbed.names == ("b.txt", "in/c.txt")
    assert open_corpus(CorpusSpec(kind="text", path=str(tmp_path / "b.txt"), valid_one_in=0)).train.names == ("b.txt",)


def test_a_separator_cuts_a_file_into_documents(tmp_path: Path) -> None:
    text = "öne||two||||three"
    write(tmp_path, t=text)
    corpus = open_corpus(CorpusSpec(kind="text", path=str(tmp_path / "t"), separator="||", valid_one_in=0))
    assert list(corpus.train) == [part for part in text.split("||") if part]


@pytest.mark.parametrize("text", ["line\n" * 50, "no line end " * 50, "ab", "é" * 11])
def test_one_document_is_cut_near_its_end(text: str) -> None:
    corpus = split(Documents.of([text]), 10)
    head, tail = corpus.train[0], corpus.valid[0]
    assert head + tail == text
    assert len(tail) <= max(1, len(text) // 10) or len(text) < 10
    assert "\n" not in text or head.endswith("\n")


def test_no_side_is_left_empty() -> None:
    for count, one_in in itertools.product(range(2, 12), (2, 3, 10)):
        corpus = split(Documents.of(["x"] * count), one_in)
        assert len(corpus.train) >= 1 and len(corpus.valid) >= 1
        assert len(corpus.train) + len(corpus.valid) == count
        assert not {*corpus.train.names} & {*corpus.valid.names}


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "other": 1}, {"text": "thrée"}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    write(tmp_path, **{"d.jsonl": lines, "ignored.txt": "x"})
    corpus = open_corpus(CorpusSpec(kind="jsonl", path=str(tmp_path), valid_one_in=0))
    assert list(corpus.train) == ["one\ntwo", "thrée"]
    assert corpus.train.names == ("d.jsonl:1", "d.jsonl:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', "line 2: no field 'text'; the line has 'body'"),
        (b"[1]", "line 2: no field 'text'; the line has a list"),
        (b'{"text": 3}', "line 2: field 'text' is a int, not a string"),
        (b'{"text": ', "line 2: not JSON"),
        (b'{"text": "\xff"}', "line 2: byte 25 is not UTF-8"),
        (b'{"text": "\\ud800"}', "line 2: field 'text' holds a lone surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, **{"d.jsonl": b'{"text": "ok"}\n' + line + b"\n"})
    corpus = open_corpus(CorpusSpec(kind="jsonl", path=str(tmp_path / "d.jsonl"), valid_one_in=0))
    assert corpus.train[0] == "ok"
    with pytest.raises(ValueError, match=f"d.jsonl, {message}"):
        corpus.train[1]


def test_text_that_is_not_utf8_is_refused_or_replaced(tmp_path: Path) -> None:
    write(tmp_path, t=b"ab\xffcd")
    spec = CorpusSpec(kind="text", path=str(tmp_path / "t"), valid_one_in=0)
    with pytest.raises(ValueError, match="byte 2 is not UTF-8"):
        open_corpus(spec).train[0]
    assert open_corpus(spec.model_copy(update={"errors": "replace"})).train[0] == "ab\ufffdcd"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "text"}, "needs path"),
        ({"path": "x"}, "'stdlib' does not use path"),
        ({"kind": "jsonl", "path": "x", "separator": "y"}, "'jsonl' does not use separator"),
        ({"valid_one_in": 1}, "valid_one_in: 1"),
        ({"kind": "web"}, "'stdlib', 'text', 'jsonl', 'parquet', 'warc', 'hub', 'generated', 'mixture' or 'store'"),
    ],
)
def test_bad_specs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusSpec.model_validate(fields)


@pytest.mark.parametrize("path", ["missing.txt", "*.none", "."])
def test_a_path_without_files(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_corpus(CorpusSpec(kind="text", path=str(tmp_path / path)))


def test_a_document_too_short_to_cut(tmp_path: Path) -> None:
    write(tmp_path, t="x", e="")
    with pytest.raises(ValueError, match="too short to cut"):
        open_corpus(CorpusSpec(kind="text", path=str(tmp_path / "t")))
    with pytest.raises(ValueError, match="holds no documents"):
        open_corpus(CorpusSpec(kind="text", path=str(tmp_path / "e"), separator="|"))


GENERATED = "c7e506c277d2388f87295afde4df78cdbd81ed82d788ea8082276e3ec1b93635"
