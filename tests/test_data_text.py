"""Text sources: what they promise about content, splits, caches, floors and batches."""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from hybridlab.base.errors import UserError
from hybridlab.data import TokenBatches, evenly_spaced, load_text
from hybridlab.data.cache import append_tokens, cached_tokens
from hybridlab.data.huggingface import load_huggingface
from hybridlab.data.python_sources import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    load_python,
    read_corpus,
    train_tokenizer,
    write_encoded,
)
from hybridlab.data.synthetic import MarkovChain

if TYPE_CHECKING:
    from tiktoken import Encoding


def source_files(root: Path, count: int = 60) -> Path:
    """Files in two folders, a third of them with repeated content, some that must be left out."""
    for number in range(count):
        folder = root / ("one" if number % 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(1 + (number % 3 == 0)):
            (folder / f"m{number}_{copy}.py").write_text(f"def f{number}(x):\n    return x + {number} * {number}\n" * 9)
    (root / "tests").mkdir()
    (root / "tests" / "left_out.py").write_text("a test\n")
    (root / "latin.py").write_bytes(b"name = '\xe9'\n")
    (root / "empty.py").write_text("\n")
    return root


def decoded(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts between the ends of texts."""
    ends = np.flatnonzero(tokens == END_OF_TEXT_ID)
    return [tokenizer.decode(part[part != END_OF_TEXT_ID].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


# --- python -------------------------------------------------------------------------------------------------


def test_corpus_holds_every_content_once_and_on_one_side(tmp_path):
    corpus = read_corpus([source_files(tmp_path)], seed=0, max_bytes=None)
    texts = corpus.train + corpus.validation
    assert len(texts) == len(set(texts)) == 60
    assert 0 < len(corpus.validation) < 12


def test_corpus_does_not_depend_on_where_files_lie(tmp_path):
    here = read_corpus([source_files(tmp_path / "a")], seed=0, max_bytes=None)
    roots = [source_files(tmp_path / "b") / "two", tmp_path / "b" / "one"]
    assert read_corpus(roots, seed=0, max_bytes=None) == here
    assert read_corpus(roots, seed=1, max_bytes=None) != here


def test_corpus_cap_takes_whole_files_and_keeps_the_split(tmp_path):
    root = source_files(tmp_path)
    whole, capped = (read_corpus([root], seed=0, max_bytes=cap) for cap in (None, 4000))
    assert set(capped.train) < set(whole.train)
    assert 3000 < sum(map(len, capped.train)) <= 4000
    assert capped.validation == whole.validation  # below the least that validation may have


def test_tokens_decode_to_the_files_and_the_vocabulary_is_kept(tmp_path):
    root = source_files(tmp_path / "src")
    data = load_python(vocab_size=300, seed=0, max_bytes=None, cache=tmp_path, roots=[root])
    tokenizer = Tokenizer.from_file(str(next(tmp_path.glob("text/*/tokenizer.json"))))
    corpus = read_corpus([root], seed=0, max_bytes=None)
    assert decoded(data.train, tokenizer) == corpus.train
    assert decoded(data.validation, tokenizer) == corpus.validation
    assert data.train.dtype == np.uint16
    assert data.train.max() < data.vocab_size == 300
    validation_bytes = sum(len(text.encode()) for text in corpus.validation)
    assert data.bytes_per_token == pytest.approx(validation_bytes / len(data.validation))


def test_a_text_that_spells_the_end_of_a_text_does_not_end_there(tmp_path):
    text = f"end = '{END_OF_TEXT}'  # \x00 π\n"
    tokenizer = train_tokenizer([text], 300)
    write_encoded([text], tokenizer, tmp_path / "x.bin")
    tokens = np.fromfile(tmp_path / "x.bin", np.uint16)
    assert (tokens == END_OF_TEXT_ID).sum() == 1
    assert decoded(tokens, tokenizer) == [text]


def test_the_installed_sources_load_and_are_the_same_the_second_time(tmp_path):
    first, second = (load_text("python", vocab_size=400, max_bytes=300_000, cache=tmp_path) for _ in range(2))
    assert first.record() == second.record()
    assert len(first.train) > 50_000
    assert json.loads(json.dumps(first.record())) == first.record()
    assert len(list(tmp_path.glob("text/*/meta.json"))) == 1
    assert load_text("python", vocab_size=400, max_bytes=300_000, cache=tmp_path / "new").sha256 == first.sha256


def test_python_needs_room_for_bytes_and_the_end_of_a_text(tmp_path):
    with pytest.raises(UserError, match="vocab_size=256: choose 257"):
        load_python(vocab_size=256, seed=0, max_bytes=None, cache=tmp_path, roots=[source_files(tmp_path / "s")])
    assert not list(tmp_path.glob("text/*/*"))
    with pytest.raises(UserError, match="raise max_bytes"):
        load_text("python", max_bytes=1, cache=tmp_path)


# --- cache --------------------------------------------------------------------------------------------------


def build_small(folder: Path) -> dict[str, int]:
    for name, count in (("train.bin", 100), ("validation.bin", 10)):
        with (folder / name).open("wb") as file:
            append_tokens(file, range(count))
    return {"answer": 42}


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[7] ^= 1
    (folder / "train.bin").write_bytes(content)


BREAKAGES = {
    "short": lambda folder: (folder / "train.bin").write_bytes(b"\0\0"),
    "odd": lambda folder: (folder / "train.bin").write_bytes(b"\0"),
    "empty": lambda folder: (folder / "validation.bin").write_bytes(b""),
    "changed": flip_a_byte,
    "no record": lambda folder: (folder / "meta.json").unlink(),
    "half a record": lambda folder: (folder / "meta.json").write_text('{"format": 1'),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_cache_is_rebuilt_with_a_message(tmp_path, breakage):
    sound = cached_tokens(tmp_path / "key", build_small)
    BREAKAGES[breakage](tmp_path / "key")
    with pytest.warns(UserWarning, match=r"is broken .*building it again"):
        mended = cached_tokens(tmp_path / "key", build_small)
    assert mended.sha256 == sound.sha256
    assert mended.facts == {"answer": 42}
    assert mended.train.tolist() == list(range(100))


def test_a_sound_cache_is_not_built_again(tmp_path):
    cached_tokens(tmp_path / "key", build_small)
    assert cached_tokens(tmp_path / "key", lambda _: pytest.fail("built again")).facts == {"answer": 42}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    def full(folder: Path) -> dict[str, int]:
        build_small(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.*HYBRIDLAB_CACHE") as caught:
        cached_tokens(tmp_path / "text" / "key", full)
    assert str(tmp_path / "text") in str(caught.value)
    assert [path.name for path in (tmp_path / "text").iterdir() if path.is_dir()] == []
    assert cached_tokens(tmp_path / "text" / "key", build_small).facts == {"answer": 42}


def test_a_cache_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write in the folder .*HYBRIDLAB_CACHE"):
        cached_tokens(tmp_path / "file" / "key", build_small)


def test_what_a_killed_process_left_does_no_harm(tmp_path):
    (tmp_path / "key.building").mkdir()
    (tmp_path / "key.building" / "train.bin").write_bytes(b"half")
    assert cached_tokens(tmp_path / "key", build_small).train.tolist() == list(range(100))
    assert not (tmp_path / "key.building").exists()


def build_logged(folder: Path) -> dict[str, int]:
    with (folder.parent / "built").open("a") as log:
        log.write("once ")
    time.sleep(0.3)
    return build_small(folder)


def test_two_processes_build_once_and_agree(tmp_path):
    fork = multiprocessing.get_context("fork")  # spawned processes would import torch for seconds
    both = [fork.Process(target=cached_tokens, args=(tmp_path / "key", build_logged)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "built").read_text() == "once "
    assert cached_tokens(tmp_path / "key", build_logged).train.tolist() == list(range(100))


def test_the_environment_chooses_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDLAB_CACHE", str(tmp_path / "elsewhere"))
    load_python(vocab_size=260, seed=0, max_bytes=None, cache=None, roots=[source_files(tmp_path / "src")])
    assert list((tmp_path / "elsewhere").glob("text/*/train.bin"))


# --- markov and uniform -------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [2, 3, 64, 500])
def test_the_chain_is_ergodic_and_its_distribution_stationary(states):
    chain = MarkovChain.random(states, np.random.default_rng(3))
    matrix = chain.transitions().toarray()
    share = chain.stationary()
    assert matrix.sum(axis=1) == pytest.approx(np.ones(states))
    assert share @ matrix == pytest.approx(share)
    assert (share > 0).all()
    assert (np.linalg.matrix_power(matrix, 4 * states) > 0).all()  # every state reaches every other


def test_the_floor_is_the_entropy_that_a_count_of_pairs_finds():
    data = load_text("markov", vocab_size=64)
    pairs = np.ones((64, 64)) * 1e-3
    np.add.at(pairs, (data.train[:-1], data.train[1:]), 1)
    predicted = pairs / pairs.sum(axis=1, keepdims=True)
    loss = -np.log(predicted[data.validation[:-1], data.validation[1:]]).mean()
    assert loss == pytest.approx(data.entropy_floor_nats, rel=0.01)
    assert data.entropy_floor_nats < 0.7 * math.log(64)


def test_synthetic_tokens_follow_from_the_seed():
    for source in ("markov", "uniform"):
        same = [load_text(source, vocab_size=32, seed=5, max_bytes=20_000) for _ in range(2)]
        other = load_text(source, vocab_size=32, seed=6, max_bytes=20_000)
        assert same[0].record() == same[1].record()
        assert other.sha256 != same[0].sha256
        assert len(other.train) == 10_000
        assert other.train.max() < 32
        assert not np.array_equal(other.train[:1000], other.validation)


def test_uniform_says_that_there_is_nothing_to_learn():
    data = load_text("uniform", vocab_size=50257, max_bytes=2_000_000)
    assert "nothing to learn" in data.description
    assert data.entropy_floor_nats == math.log(50257)
    assert data.bytes_per_token is None
    assert data.train.mean() == pytest.approx(50256 / 2, rel=0.01)


# --- bin ----------------------------------------------------------------------------------------------------


def shard(path: Path, tokens: list[int], *, version: int = 1, count: int | None = None) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def nanogpt(folder: Path, train: list[int], validation: list[int]) -> None:
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(validation, "<u2").tofile(folder / "val.bin")


def test_nanogpt_files_are_mapped_and_nothing_is_unpickled(tmp_path):
    nanogpt(tmp_path, [1, 2, 50256], [4, 5])
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    data = load_text(f"bin:{tmp_path}")
    assert (data.train.tolist(), data.validation.tolist()) == ([1, 2, 50256], [4, 5])
    assert data.vocab_size == 50257
    assert isinstance(data.train, np.memmap)


def test_shards_lose_their_header_and_are_joined_in_order(tmp_path):
    shard(tmp_path / "web_train_000002.bin", [3, 4])
    shard(tmp_path / "web_train_000001.bin", [1, 2])
    shard(tmp_path / "web_val_000000.bin", [9])
    for argument in (str(tmp_path), str(tmp_path / "web_*.bin")):
        data = load_text(f"bin:{argument}", vocab_size=10, cache=tmp_path / "cache")
        assert (data.train.tolist(), data.validation.tolist()) == ([1, 2, 3, 4], [9])
    assert load_text(f"bin:{tmp_path}", cache=tmp_path / "cache", max_bytes=6).train.tolist() == [1, 2, 3]


def test_token_files_that_contradict_themselves_are_refused(tmp_path):
    nanogpt(tmp_path, [1, 300], [4, 5])
    with pytest.raises(UserError, match=r"train.bin: token 300 is not below vocab_size=300"):
        load_text(f"bin:{tmp_path}", vocab_size=300)
    (tmp_path / "val.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="whole number of 16-bit tokens"):
        load_text(f"bin:{tmp_path}")
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds no tokens"):
        load_text(f"bin:{tmp_path}")
    shard(tmp_path / "val.bin", [1, 2], count=3)
    with pytest.raises(UserError, match="are not 3 tokens"):
        load_text(f"bin:{tmp_path}")
    shard(tmp_path / "val.bin", [1, 2], version=7)
    with pytest.raises(UserError, match="version 7"):
        load_text(f"bin:{tmp_path}")


RNG = np.random.default_rng(0)
GPT2_TOKENS, LLAMA_TOKENS, LETTERS = (RNG.integers(size, size=600) for size in (50257, 128256, 65))
LLAMA_FILE = np.array([20240801, 7, 600, *[0] * 253], "<i4").tobytes() + LLAMA_TOKENS.astype("<u4").tobytes()
NPY = io.BytesIO()
np.save(NPY, GPT2_TOKENS.astype("<u2"))
OTHER_FILES = {
    "uint32": (GPT2_TOKENS.astype("<u4").tobytes(), "holds 32-bit integers: convert it to little-endian uint16"),
    "uint32 of a large vocabulary": (LLAMA_TOKENS.astype("<u4").tobytes(), "holds 32-bit integers: convert"),
    "int64": (GPT2_TOKENS.tobytes(), "holds 64-bit integers: convert"),
    "int64 letters": (LETTERS.tobytes(), "holds 64-bit integers: convert"),
    "float32": (RNG.random(600).astype("<f4").tobytes(), "holds 32-bit floats: convert"),
    "float64": (RNG.random(600).tobytes(), "holds 64-bit floats: convert"),
    "big-endian": (GPT2_TOKENS.astype(">u2").tobytes(), "holds big-endian tokens, or bytes: convert"),
    "big-endian letters": (LETTERS.astype(">u2").tobytes(), "holds big-endian tokens: convert"),
    "bytes": (LETTERS.astype(np.uint8).tobytes(), "holds big-endian tokens, or bytes: convert"),
    "text": ("Grüße, world.\n".encode() * 9, "holds text: convert it .* or name its folder as hf:FOLDER"),
    "npy": (NPY.getvalue(), r"is a .npy array: convert it .*tofile"),
    "npz": (b"PK\3\4" + bytes(60), "is a zip archive: unpack it"),
    "gzip": (gzip.compress(b"a"), "is a gzip file: unpack it"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer.*run `git lfs pull` there"),
    "llm.c's Llama-3": (LLAMA_FILE, "holds llm.c's Llama-3 tokens.*--model gpt-2"),
    "another header": (
        np.array([20240900, 1], "<i4").tobytes(),
        "has a header with the unknown magic 20240900",
    ),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_files_that_are_no_uint16_tokens_are_told_by_what_they_are(tmp_path, kind, name):
    nanogpt(tmp_path, [1, 2, 3], [4, 5])
    content, message = OTHER_FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {message}") as refused:
        load_text(f"bin:{tmp_path}", vocab_size=65536)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("vocab_size", [2, 65, 300, 65536])
@pytest.mark.parametrize("count", [3, 33, 300, 5000])
def test_uint16_tokens_of_any_vocabulary_are_no_other_format(tmp_path, vocab_size, count):
    for source in ("uniform", "markov"):
        tokens = load_text(source, vocab_size=vocab_size, max_bytes=2 * count).train.tolist()
        nanogpt(tmp_path, tokens, tokens[1:])
        assert load_text(f"bin:{tmp_path}", vocab_size=vocab_size).train.tolist() == tokens


def test_token_files_by_another_name_or_kind_are_refused_or_found(tmp_path):
    nanogpt(tmp_path, [1, 2], [1, 2])
    with pytest.raises(UserError, match=r"val.bin holds the training tokens again: validate with others"):
        load_text(f"bin:{tmp_path}")
    nanogpt(tmp_path, [1, 2], [4, 5])
    (tmp_path / "val.bin").rename(tmp_path / "validation.bin")
    with pytest.raises(UserError, match=r"validation.bin: the validation tokens are looked for as val.bin: rename it"):
        load_text(f"bin:{tmp_path}")
    (tmp_path / "val.bin").mkdir()
    with pytest.raises(UserError, match=r"val.bin is a folder: a file of tokens is wanted there"):
        load_text(f"bin:{tmp_path}")
    with pytest.raises(UserError, match=r"train.bin: no training tokens there: it is a file: name its folder"):
        load_text(f"bin:{tmp_path / 'train.bin'}")
    for part, file in (("train", "train.bin"), ("val", "validation.bin")):
        (tmp_path / "shakespeare").mkdir(exist_ok=True)
        (tmp_path / file).rename(tmp_path / "shakespeare" / f"tiny_{part}.bin")
    assert load_text(f"bin:{tmp_path / 'shakespeare'}").validation.tolist() == [4, 5]


def test_missing_token_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no training tokens"):
        load_text(f"bin:{tmp_path / 'nowhere'}")
    shard(tmp_path / "web_train_0.bin", [1])
    with pytest.raises(UserError, match=r"no validation tokens there: expected val.bin or \*_val_\*.bin"):
        load_text(f"bin:{tmp_path}")


# --- hf -----------------------------------------------------------------------------------------------------


def words() -> Encoding:
    """One token per byte: a stand-in for GPT-2's tokens, which need a download."""
    tiktoken = pytest.importorskip("tiktoken")
    single = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=single, special_tokens={"<|endoftext|>": 256})


def jsonl(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": number, column: text}) + "\n" for number, text in enumerate(texts)))


@pytest.fixture
def hf(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(argument: object, vocab_size: int = 257, max_bytes: int | None = None):
        cache = tmp_path / "cache"
        return load_huggingface(
            str(argument), vocab_size=vocab_size, max_bytes=max_bytes, cache=cache, make_encoder=words
        )

    return load


def documents(tokens: np.ndarray) -> list[str]:
    return bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)).decode().split("\0")[:-1]


def test_hf_takes_the_validation_split_where_there_is_one(hf, tmp_path):
    jsonl(tmp_path / "set" / "train.jsonl", ["one", "two", "thrée"])
    jsonl(tmp_path / "set" / "validation.jsonl", ["held out"])
    data = hf(tmp_path / "set")
    assert documents(data.train) == ["one", "two", "thrée"]
    assert documents(data.validation) == ["held out"]
    assert data.bytes_per_token == pytest.approx(8 / 9)
    assert "bytes tokens" in data.description


def test_hf_holds_out_every_twentieth_document_of_a_single_split(hf, tmp_path):
    texts = [f"document {number}" for number in range(50)]
    jsonl(tmp_path / "all.jsonl", texts, column="content")
    data = hf(tmp_path / "all.jsonl")
    assert documents(data.validation) == [texts[19], texts[39]]
    assert documents(data.train) == [text for text in texts if text not in (texts[19], texts[39])]


def test_hf_caps_whole_documents_and_sees_a_changed_file(hf, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    for split, count in (("train", 30), ("test", 3)):
        pq.write_table(pa.table({"text": ["x" * 10] * count}), tmp_path / "set" / f"{split}.parquet")
    assert documents(hf(tmp_path / "set", max_bytes=45).train) == ["x" * 10] * 4
    pq.write_table(pa.table({"text": ["yy"] * 30}), tmp_path / "set" / "train.parquet")
    assert documents(hf(tmp_path / "set", max_bytes=45).train) == ["yy"] * 22


def test_hf_refuses_what_it_cannot_use(hf, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        hf(tmp_path / "nowhere")
    jsonl(tmp_path / "set" / "train.jsonl", ["one"] * 40)
    with pytest.raises(UserError, match="set vocab_size=257"):
        hf(tmp_path / "set", vocab_size=256)
    assert not list((tmp_path / "cache").glob("text/*/*"))  # refused before anything was built
    with pytest.raises(UserError, match="raise max_bytes"):
        hf(tmp_path / "set", max_bytes=1)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "train.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="no column of text: its columns are a"):
        hf(tmp_path / "numbers")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        hf(tmp_path / "none")


def test_a_device_that_has_no_end_is_refused():
    with pytest.raises(UserError, match="/dev/zero is a device"):
        load_text("file:/dev/zero")


def test_hf_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    jsonl(tmp_path / "set" / "train.jsonl", ["one"])
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        load_huggingface(str(tmp_path / "set"), vocab_size=257, max_bytes=None, cache=tmp_path, make_encoder=words)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        load_text(f"hf:{tmp_path / 'set'}", cache=tmp_path)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pyton", "did you mean 'python'"),
        ("Markow", "did you mean 'markov'"),
        ("huggingface:x", "choose one of python, markov, uniform, file:PATH, bin:PATH, hf:NAME"),
        ("bin", "must be written 'bin:PATH'"),
        ("python:3", "must be written 'python'"),
    ],
)
def test_a_wrong_source_names_the_right_one(source, message):
    with pytest.raises(UserError, match=message):
        load_text(source)


@pytest.mark.parametrize("setting", [{"vocab_size": 1}, {"vocab_size": 65537}, {"seed": -1}, {"max_bytes": 0}])
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))}=.*choose"):
        load_text("uniform", **setting)


# --- batches ------------------------------------------------------------------------------------------------

STREAM = np.arange(1000, dtype=np.uint16)


def test_targets_are_the_tokens_one_place_later():
    tokens, targets = TokenBatches(STREAM, batch_size=3, block_size=8, seed=0)(5)
    assert tokens.shape == targets.shape == (3, 8)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)
    assert tokens.is_contiguous()
    assert targets.is_contiguous()


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = (TokenBatches(STREAM, batch_size=4, block_size=8, seed=1) for _ in range(2))
    for step in range(7):
        one(step)
    assert torch.equal(one(7)[0], other(7)[0])
    assert not torch.equal(one(7)[0], one(8)[0])
    assert not torch.equal(one(7)[0], TokenBatches(STREAM, batch_size=4, block_size=8, seed=2)(7)[0])


def test_windows_reach_both_ends_and_never_leave_the_stream():
    batches = TokenBatches(STREAM[:10], batch_size=64, block_size=8, seed=0)
    tokens, targets = batches(0)
    assert set(tokens[:, 0].tolist()) == {0, 1}
    assert targets.max() == 9
    TokenBatches(STREAM[:9], batch_size=2, block_size=8, seed=0)(0)


@pytest.mark.parametrize("length", [2 * 3 * 16 + 1, 128, 1000])
def test_validation_windows_do_not_overlap_and_span_the_stream(length):
    batches = evenly_spaced(STREAM[:length], batches=2, batch_size=3, block_size=16)
    assert [tokens.shape for tokens, _ in batches] == [(3, 16), (3, 16)]
    targets = torch.cat([targets.flatten() for _, targets in batches])
    assert len(targets.unique()) == len(targets)
    assert (batches[0][0].min(), targets.max()) == (0, length - 1)


def test_a_stream_too_short_is_refused_with_the_number_it_needs():
    with pytest.raises(UserError, match="the training text has 8 tokens, but a window of 8 needs 9: lower block_size"):
        TokenBatches(STREAM[:8], batch_size=1, block_size=8, seed=0)
    with pytest.raises(UserError, match="need 1,025"):
        evenly_spaced(STREAM, batches=8, batch_size=8, block_size=16)
