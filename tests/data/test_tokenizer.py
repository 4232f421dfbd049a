import hashlib
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax import config
from conan_jax.data import tokenizer as tok
from conan_jax.errors import DataError
from tests.data.corpus import sentences, tokenizer

AWKWARD = st.sampled_from([
    "\u2581", "\u2581\u2581", " ", "  ", "\n", "\r\n", "\t", "\0", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>",
    "\u2585", "\ufffd", "\ufeff",
    "\u0301", "e\u0301", "\u200d", "\U0001f469\u200d\U0001f4bb", "\U0010ffff", "\u2028", "\u00a0", "\u3000", " \u2047 ", "模型", "ß",
])
ANY_TEXT = st.lists(st.one_of(AWKWARD, st.text(max_size=8), st.sampled_from(sentences(20)))).map("".join)


@given(ANY_TEXT)
@settings(max_examples=600, deadline=None)
def test_decode_inverts_encode_for_any_unicode_text(text):
    t = tokenizer()
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert all(i > t.eos_id for i in ids)  # text never becomes a special token


@given(st.lists(ANY_TEXT, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_batch_encodes_like_its_texts_alone(texts):
    t = tokenizer()
    assert t.encode_batch(texts) == [t.encode(text) for text in texts]


def test_every_code_point_survives():
    t = tokenizer()
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for start in range(0, len(points), 4096):
        block = "".join(points[start : start + 4096])
        assert t.decode(t.encode(block)) == block


def test_normal_forms_stay_apart():
    t = tokenizer()
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    assert t.encode(composed) != t.encode(decomposed)


def test_a_space_sign_of_the_text_is_not_a_space():
    t = tokenizer()
    assert t.encode("a\u2581b") != t.encode("a b")
    assert len(t.encode("\u2581")) == 3  # its three bytes


def test_special_ids_are_fixed_and_silent():
    t = tokenizer()
    assert (t.pad_id, t.unk_id, t.bos_id, t.eos_id) == (0, 1, 2, 3)
    assert t.decode([0, 2, *t.encode("file"), 3, 0]) == "file"


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character():
    t = tokenizer()
    assert t.decode(t.encode("\u2581")[:2]) == "\ufffd"


@pytest.mark.parametrize("ids", [[-1], [600], [4, 10**6]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(DataError, match="outside the vocabulary of 600"):
        tokenizer().decode(ids)


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(DataError, match="lone surrogate at character 3"):
        tokenizer().encode_batch(["fine", "abc\ud800"])


def test_training_is_deterministic_and_recorded(tmp_path):
    wanted = config.Tokenizer(vocab_size=400)
    first = tok.train_tokenizer(sentences(300), wanted, tmp_path / "a", extra={"note": "x"})
    second = tok.train_tokenizer(sentences(300), wanted, tmp_path / "b")
    assert first.sha256 == second.sha256 == hashlib.sha256((tmp_path / "a" / "tokenizer.model").read_bytes()).hexdigest()
    recorded = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    assert recorded["sha256"] == first.sha256 and recorded["vocab_size"] == 400 and recorded["note"] == "x"
    loaded = tok.Tokenizer.load(tmp_path / "a")
    assert loaded.sha256 == first.sha256 and loaded.vocab_size == 400
    assert tok.Tokenizer.load(tmp_path / "a" / "tokenizer.model").encode("read the file") == first.encode("read the file")


def test_texts_longer_than_the_trainer_takes_are_split_not_dropped(tmp_path):
    word = "quixotic"
    t = tok.train_tokenizer([" ".join([word] * 20_000)], config.Tokenizer(vocab_size=274), tmp_path)
    assert len(t.encode(" " + word)) < len(word)  # it was seen and merged


def test_too_small_a_corpus_names_the_size_that_works(tmp_path):
    with pytest.raises(DataError) as error:
        tok.train_tokenizer(["hello world"], config.Tokenizer(vocab_size=8000), tmp_path)
    works = int(str(error.value).split("tokenizer.vocab_size=")[1].split()[0])
    assert tok.train_tokenizer(["hello world"], config.Tokenizer(vocab_size=works), tmp_path).vocab_size == works


def test_too_small_a_vocabulary_for_the_characters_is_explained(tmp_path):
    with pytest.raises(DataError, match="does not hold the characters"):
        many = "".join(chr(0x4E00 + i) for i in range(400))
        tok.train_tokenizer([many], config.Tokenizer(vocab_size=300, character_coverage=1.0), tmp_path)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_explained(tmp_path, texts):
    with pytest.raises(DataError, match="tokenizer.datasets"):
        tok.train_tokenizer(texts, config.Tokenizer(vocab_size=300), tmp_path)


def test_the_sample_is_spread_evenly_and_bounded():
    texts = [f"{i:04d}" for i in range(1000)]
    kept = tok.spread_sample(iter(texts), 1200)
    assert kept == texts[::4]
    assert tok.spread_sample(iter(texts), 4000) == texts
    assert len(tok.spread_sample(["x" * 50, "y"], 10)) == 1  # a single text is never refused


def unread():
    raise AssertionError("the texts were read")
    yield


@pytest.mark.parametrize("out", ["taken", "taken/below/it"])
def test_a_file_where_the_folder_should_be_is_refused_before_training(tmp_path, out):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match="taken is a file, not a folder"):
        tok.train_tokenizer(unread(), config.Tokenizer(vocab_size=400), tmp_path / out)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tok.os, "access", lambda path, mode: path != tmp_path)  # chmod does not stop a superuser
    with pytest.raises(DataError, match=f"cannot write in {tmp_path};"):
        tok.train_tokenizer(unread(), config.Tokenizer(vocab_size=400), tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_an_error_without_a_traceback(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tok, "write_file", full)
    with pytest.raises(DataError, match="No space left on device; check that the disk"):
        tok.train_tokenizer(sentences(300), config.Tokenizer(vocab_size=400), tmp_path / "t")


def test_a_changed_model_file_is_refused(tmp_path):
    tok.train_tokenizer(sentences(300), config.Tokenizer(vocab_size=400), tmp_path / "a")
    tok.train_tokenizer(sentences(300), config.Tokenizer(vocab_size=401), tmp_path / "b")
    (tmp_path / "a" / "tokenizer.model").write_bytes((tmp_path / "b" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="altered"):
        tok.Tokenizer.load(tmp_path / "a")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer"):
        tok.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        tok.Tokenizer.load(tmp_path)


def test_a_foreign_model_without_our_ids_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences(300)), model_writer=model, vocab_size=300, model_type="bpe",
                                             minloglevel=2)
    with pytest.raises(DataError, match="pad, unk, bos, eos"):
        tok.Tokenizer(model.getvalue())


def test_the_commands_train_describe_and_encode(tmp_path):
    from typer.testing import CliRunner

    from conan_jax.cli.tokenizer import app
    from conan_jax.data.convert import build_dataset

    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(300)))
    build_dataset(config.Dataset("docs", "text", str(tmp_path / "raw.jsonl")), tmp_path / "docs")
    run = CliRunner().invoke
    trained = run(app, ["train", str(tmp_path / "docs"), "--out", str(tmp_path / "t"), "--vocab-size", "400"])
    assert trained.exit_code == 0, trained.output
    t = tok.Tokenizer.load(tmp_path / "t")
    assert t.sha256 in trained.output
    other = run(app, ["train", str(tmp_path / "docs"), "--out", str(tmp_path / "t"), "--vocab-size", "401"])
    assert f"replaces the tokenizer {t.sha256[:12]}" in other.output
    same = run(app, ["train", str(tmp_path / "docs"), "--out", str(tmp_path / "t"), "--vocab-size", "401"])
    assert "replaces" not in same.output
    t = tok.Tokenizer.load(tmp_path / "t")
    described = json.loads(run(app, ["info", str(tmp_path / "t"), "--json"]).output)
    assert (described["sha256"], described["vocab_size"], described["special_ids"]["eos"]) == (t.sha256, 401, 3)
    text = "read the \u2581 file"
    assert run(app, ["encode", str(tmp_path / "t"), text]).output.split() == list(map(str, t.encode(text)))
    assert run(app, ["encode", str(tmp_path / "t")], input="read".encode()).output.split() == list(map(str, t.encode("read")))
    assert "".join(json.loads(run(app, ["encode", str(tmp_path / "t"), "read the", "--pieces"]).output)) == "read the"


@pytest.mark.parametrize("arguments", [["train"], ["train", "docs"], ["train", "docs", "--config", "x.py"]])
def test_unclear_commands_say_what_to_give(arguments):
    from typer.testing import CliRunner

    from conan_jax.cli.tokenizer import app
    from conan_jax.errors import ConfigError

    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError) and "--config" in str(result.exception)
