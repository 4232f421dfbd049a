"""A tokenizer.json that came with a model: the contract of ours, its special ids, cut texts, packed rows."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from conan_jax import config
from conan_jax.data import transforms
from conan_jax.data.json_tokenizer import CONFIG_FILE, JSON_FILE, SETTINGS_FILE, JsonTokenizer
from conan_jax.data.packing import open_packed, pack
from conan_jax.data.tokenizer import Tokenizer, read_settings, train_tokenizer
from conan_jax.errors import DataError

TEXTS = ["The reader reads a file, line by line.\n", "Die Katze sitzt auf der Matte.   Und schläft!", "我们在图书馆里读书。",
         "x = [1, 22, 333]\n\n\n  pass"] * 20


def train(special=("<|pad|>", "<|end|>")):
    """A byte-level BPE as GPT-2's, Llama 3's and Qwen's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


MADE = train()


def folder_with(path, made=MADE, settings=None, model=None):
    path.mkdir(exist_ok=True)
    made.save(str(path / JSON_FILE))
    for name, content in ((CONFIG_FILE, settings), ("config.json", model)):
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture
def loaded(tmp_path):
    return Tokenizer.load(folder_with(tmp_path / "t", settings={"eos_token": "<|end|>", "pad_token": {"content": "<|pad|>"}}))


def test_the_contract(loaded):
    assert isinstance(loaded, JsonTokenizer)
    assert (loaded.vocab_size, loaded.pad_id, loaded.eos_id, loaded.bos_id, loaded.unk_id) == (MADE.get_vocab_size(), 0, 1, None, None)
    for text in TEXTS[:4]:
        assert loaded.encode(text) == MADE.encode(text, add_special_tokens=False).ids
        assert loaded.decode([0, *loaded.encode(text), 1]) == text
    assert loaded.encode_batch(TEXTS) == [loaded.encode(text) for text in TEXTS] and loaded.encode_batch([]) == []
    assert loaded.encode("") == [] and loaded.decode([]) == ""
    assert loaded.max_piece_length >= max(len(MADE.decode([i])) for i in range(2, MADE.get_vocab_size()))


def test_no_special_id_can_be_spelled(loaded):
    assert MADE.encode("a<|end|>b").ids.count(1) == 1  # as it comes, the library reads it as the end
    ids = loaded.encode("a<|end|>b<|pad|>")
    assert not {0, 1} & set(ids) and loaded.decode(ids) == "a<|end|>b<|pad|>"


def test_saved_and_loaded_again(loaded, tmp_path):
    loaded.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert again.sha256 == loaded.sha256 and (again.pad_id, again.eos_id) == (0, 1)
    assert (tmp_path / "copy" / JSON_FILE).read_bytes() == (tmp_path / "t" / JSON_FILE).read_bytes()
    assert read_settings(tmp_path / "copy") == {}
    settings = json.loads((tmp_path / "copy" / SETTINGS_FILE).read_text())
    (tmp_path / "copy" / SETTINGS_FILE).write_text(json.dumps({**settings, "eos_id": 7}))
    with pytest.raises(DataError, match="was altered"):
        Tokenizer.load(tmp_path / "copy")


def test_the_end_of_text_is_part_of_what_it_is(loaded, tmp_path):
    other = Tokenizer.load(folder_with(tmp_path / "o", settings={"eos_token": "<|pad|>"}))
    assert other.sha256 != loaded.sha256


@pytest.mark.parametrize("settings, model, expected", [
    ({"eos_token": "<|end|>"}, None, (1, 1)),  # no pad token: the end of text serves
    (None, {"eos_token_id": [1, 0], "pad_token_id": 5}, (5, 1)),
    ({"eos_token": "no such token"}, {"eos_token_id": 1}, (1, 1)),
    ({"pad_token": None, "eos_token": "<|end|>"}, {"eos_token_id": 9, "pad_token_id": -1}, (1, 1)),
])
def test_special_ids_come_from_the_files_beside_it(tmp_path, settings, model, expected):
    tokenizer = Tokenizer.load(folder_with(tmp_path / "t", settings=settings, model=model))
    assert (tokenizer.pad_id, tokenizer.eos_id) == expected


@pytest.mark.parametrize("settings, model, message", [
    (None, None, "which token ends a text"), (None, {"eos_token_id": 100_000}, "eos_id is 100000"),
    ({"eos_token": "<|end|>"}, {"pad_token_id": 999}, "pad_id is 999"),
])
def test_a_tokenizer_without_an_end_is_refused(tmp_path, settings, model, message):
    with pytest.raises(DataError, match=message):
        Tokenizer.load(folder_with(tmp_path / "t", settings=settings, model=model))


def test_what_is_no_tokenizer_is_refused(tmp_path, loaded):
    with pytest.raises(DataError, match="no tokenizer.json that can be read"):
        JsonTokenizer(b'{"model": {}}', eos_id=0)
    (folder_with(tmp_path / "b", model={"eos_token_id": 1}) / JSON_FILE).write_text('{"model": {"type": "none"}}')
    with pytest.raises(DataError, match="no tokenizer.json that can be read"):
        Tokenizer.load(tmp_path / "b")
    for call in (lambda: loaded.encode("a\ud800b"), lambda: loaded.encode_batch(["fine", "a\ud800b"])):
        with pytest.raises(DataError, match="lone surrogate at character 1"):
            call()
    for ids in ([-1], [loaded.vocab_size]):
        with pytest.raises(DataError, match="outside the vocabulary"):
            loaded.decode(ids)


def test_both_kinds_beside_each_other_open_as_sentencepiece(tmp_path):
    ours = train_tokenizer(TEXTS, config.Tokenizer(vocab_size=320), tmp_path)
    MADE.save(str(tmp_path / JSON_FILE))  # as in an export
    assert Tokenizer.load(tmp_path).sha256 == ours.sha256 and read_settings(tmp_path) == {}


def test_batches_end_in_its_own_end_and_pad(loaded):
    loaded.pad_id = 9
    batch = transforms.encode_texts(loaded, ["The reader", ""], 26, ["find", "find"])
    prompt, text = loaded.encode("Instruct: find\nQuery: "), loaded.encode("The reader")
    row = [*prompt, *text][:25] + [1]
    assert batch["tokens"][0].tolist() == row + [9] * (26 - len(row)) and batch["lengths"].tolist() == [len(row), len(prompt) + 1]
    stacked, _ = transforms.stack_texts(loaded, [["The"], []], 2, 6)
    assert (stacked["tokens"][1] == 9).all()


@pytest.mark.parametrize("length", [1, 7, 40])
def test_a_long_text_is_cut_to_the_tokens_of_the_whole(loaded, length):
    rng = np.random.default_rng(0)
    words = [" ", "  ", "\n", "\n \n", "reader", "Katze", "图书馆", "333", "!?", "\t"]
    for _ in range(20):
        text = "".join(words[i] for i in rng.integers(0, len(words), 3000))
        assert transforms.encode_heads(loaded, [text], length)[0][:length] == loaded.encode(text)[:length]


def test_a_cut_inside_a_long_piece_is_seen(tmp_path):
    """" internationalisation" is one token; cut, it is many, and as many as a row holds."""
    made = tokenizers.Tokenizer(models.BPE(merges=[], vocab={c: i for i, c in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "\u2581"])}))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens(["internationalisation"])
    tokenizer = JsonTokenizer(made.to_str().encode(), eos_id=0)
    text = "internationalisation" * 500
    for length in range(1, 40):
        assert transforms.encode_heads(tokenizer, [text], length)[0][:length] == tokenizer.encode(text)[:length]


def test_packed_rows_end_documents_with_its_own_end(loaded, tmp_path):
    records = [{"text": text.strip()} for text in TEXTS[:4]]
    pack(records, loaded, "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    rows = open_packed(tmp_path / "p")
    found = [row["tokens"][row["segment_ids"] == s].tolist() for row in rows for s in set(row["segment_ids"].tolist()) - {0}]
    assert sorted(found) == sorted([*loaded.encode(r["text"]), 1] for r in records)
