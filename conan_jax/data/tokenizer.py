"""SentencePiece BPE with byte fallback: train, load, encode, decode.

The text is never touched: identity normalisation, no dummy prefix, no whitespace removal, so
`decode(encode(x)) == x` for every valid Unicode string. SentencePiece writes a space as U+2581 inside its
pieces, so a U+2581 of the text itself would come back as a space; it is spelled in its three bytes instead.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from conan_jax import config
from conan_jax.data.json_tokenizer import JSON_FILE, JsonTokenizer, is_tokenizer_json, refuse_surrogates
from conan_jax.errors import DataError
from conan_jax.files import read_json, write_file, write_json

PAD, UNK, BOS, EOS = 0, 1, 2, 3
MODEL_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer.json"

_SPACE = "\u2581"
_MAX_SENTENCE_BYTES = 4096
_TRAINER_THREADS = 16  # a constant: the number is written into the model, and the model's sha256 must not depend on the machine


class Tokenizer:
    """A trained model. Build it with `Tokenizer.load` or `train_tokenizer`.

    pad 0, unk 1, bos 2, eos 3; `encode` adds none of them. Encoding a batch releases the interpreter lock, so
    threads run in parallel.
    """

    pad_id, unk_id, bos_id, eos_id = PAD, UNK, BOS, EOS
    prefix_ids, suffix_ids = (), (EOS,)  # before and after every text, in rows
    reads_special = False  # no special id can be spelled by a text
    lower_case = False  # texts are read as they are
    splits_at_spaces = True  # no piece reaches from a word over the space after it

    def __init__(self, model: bytes, origin: str = "the given bytes") -> None:
        """`model` is the content of a SentencePiece model file; raises `DataError` when it is not one of ours."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{origin} is not a SentencePiece model ({_reason(error)}); train one with `conan tokenizer train`") from error
        sp = self._processor
        found = (sp.pad_id(), sp.unk_id(), sp.bos_id(), sp.eos_id())
        if found != (PAD, UNK, BOS, EOS):
            raise DataError(f"{origin} has (pad, unk, bos, eos) = {found}, but {(PAD, UNK, BOS, EOS)} is needed; "
                            "train one with `conan tokenizer train`")
        self.vocab_size: int = sp.get_piece_size()
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self._model = model
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self.max_piece_length: int = max(len(sp.id_to_piece(i)) for i in range(self.vocab_size) if not sp.is_byte(i))  # characters
        byte_ids = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_byte(i)}
        if len(byte_ids) != 256:
            raise DataError(f"{origin} has no byte fallback, so some text could not be encoded; train one with `conan tokenizer train`")
        self._space_ids = [byte_ids[f"<0x{b:02X}>"] for b in _SPACE.encode()]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnyTokenizer:
        """Read a model file, or the folder that holds `tokenizer.model`; or the folder of a `JsonTokenizer`.

        Raises `DataError` when it is missing, unreadable, or not the model that the `tokenizer.json` beside it describes.
        """
        path = Path(path)
        if path.is_dir() and not (path / MODEL_FILE).exists() and is_tokenizer_json(path / JSON_FILE):
            return JsonTokenizer.load(path)
        file = path / MODEL_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"there is no tokenizer at {file}; train one with `conan tokenizer train`")
        tokenizer = cls(file.read_bytes(), origin=str(file))
        settings = file.parent / SETTINGS_FILE
        if file.name == MODEL_FILE and settings.is_file() and not is_tokenizer_json(settings):
            recorded = read_settings(file.parent).get("sha256")
            if recorded != tokenizer.sha256:
                raise DataError(f"{file} has sha256 {tokenizer.sha256}, but {settings} says {recorded}: the model was altered; "
                                "copy it anew or train it again")
        return tokenizer

    @property
    def model_bytes(self) -> bytes:
        """The content of the model file."""
        return self._model

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special ids. Raises `DataError` for a lone surrogate, which is not valid Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Token ids of each text, in order; 3-4 MB of text a second and thread."""
        parts: list[str] = []
        counts = []
        for text in texts:
            pieces = text.split(_SPACE)
            parts += pieces
            counts.append(len(pieces))
        try:
            encoded = self._processor.encode(parts, num_threads=num_threads)
        except (RuntimeError, TypeError) as error:
            refuse_surrogates(texts)
            raise DataError(f"a text could not be encoded: {_reason(error)}") from error
        if len(parts) == len(counts):
            return encoded
        rows, start = [], 0
        for count in counts:
            row = list(encoded[start])
            for piece in encoded[start + 1 : start + count]:
                row += self._space_ids
                row += piece
            rows.append(row)
            start += count
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special ids vanish; bytes that do not form UTF-8 become U+FFFD. Raises `DataError` for an unknown id."""
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}; was it made by another tokenizer?")
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str], settings: dict[str, object] | None = None) -> None:
        """Write `tokenizer.model` and `tokenizer.json` (sha256, vocabulary, `settings`); each file appears whole or not at all."""
        folder = Path(folder)
        described = {"sha256": self.sha256, "vocab_size": self.vocab_size, **(settings or {})}
        # The description goes last: a folder that has it is complete.
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        write_file(folder / MODEL_FILE, self._model)
        write_json(folder / SETTINGS_FILE, described)

    def _piece_bytes(self, token: int) -> bytes:
        sp = self._processor
        if sp.is_control(token) or sp.is_unknown(token):
            return b""
        piece = sp.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace(_SPACE, " ").encode()


AnyTokenizer = Tokenizer | JsonTokenizer


def train_tokenizer(
    texts: Iterable[str],
    settings: config.Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    extra: dict[str, object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Train BPE on `texts` and write it to `out_dir`; the same texts and settings give the same bytes.

    At most `settings.max_training_bytes` of text is used: when there is more, every 2nd, 4th, 8th ... text, so that
    the sample is spread over the whole. Digits are single tokens (numbers stay comparable) and runs of spaces may
    merge (indentation). `extra` is kept in `tokenizer.json`; `progress` is called with the bytes read so far.

    Raises `DataError` when there is no text, too little for `vocab_size` (it names the size that works), or when
    `out_dir` cannot be written, which is found before anything is read.
    """
    _refuse_unwritable(Path(out_dir))
    sample = spread_sample(texts, settings.max_training_bytes, progress)
    if not sample:
        raise DataError("there is no text to train the tokenizer on; name datasets with records in tokenizer.datasets")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample), model_writer=model, model_type="bpe", vocab_size=settings.vocab_size,
            byte_fallback=True, character_coverage=settings.character_coverage,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True,
            pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_piece="<pad>", unk_piece="<unk>", bos_piece="<s>", eos_piece="</s>",
            max_sentence_length=_MAX_SENTENCE_BYTES + 1, train_extremely_large_corpus=settings.max_training_bytes > 1_000_000_000,
            num_threads=_TRAINER_THREADS, minloglevel=2,
        )
    except (RuntimeError, TypeError) as error:
        refuse_surrogates(sample)
        raise _training_error(error, settings, sum(len(text.encode()) for text in sample)) from error
    tokenizer = Tokenizer(model.getvalue(), origin="the trained model")
    try:
        tokenizer.save(out_dir, {
            "kind": "sentencepiece-bpe", "character_coverage": settings.character_coverage,
            "max_training_bytes": settings.max_training_bytes, **(extra or {}),
        })
    except OSError as error:
        raise DataError(f"the tokenizer cannot be written to {out_dir}: {error.strerror}; "
                        "check that the disk has room and that the folder may be written") from None
    return tokenizer


def _refuse_unwritable(folder: Path) -> None:
    """Hours of training must not end in a folder that cannot be made. Asks without making anything: the training may yet fail."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise DataError(f"{place} is a file, not a folder; name another folder for the tokenizer, or move the file away")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"cannot write in {place}; name another folder for the tokenizer")


def read_settings(folder: str | os.PathLike[str]) -> dict[str, object]:
    """How the tokenizer in a folder was trained; `{}` when nothing says it. Raises `DataError` when the file is not JSON."""
    settings = read_json(Path(folder) / SETTINGS_FILE, {})
    return {} if isinstance(settings.get("model"), dict) else settings  # that is a tokenizer itself


def spread_sample(texts: Iterable[str], max_bytes: int, progress: Callable[[int], None] | None = None) -> list[str]:
    """All texts when they fit into `max_bytes`, else those at multiples of the smallest power of two that makes them fit.

    One pass, never more than `max_bytes` (and one text) in memory, no randomness.
    """
    kept: list[tuple[int, str, int]] = []
    stride, total, read = 1, 0, 0
    for index, text in enumerate(texts):
        size = len(text.encode("utf-8", errors="replace"))
        read += size
        if progress is not None:
            progress(read)
        if index % stride:
            continue
        kept.append((index, text, size))
        total += size
        while total > max_bytes and len(kept) > 1:
            stride *= 2
            kept = [item for item in kept if item[0] % stride == 0]
            total = sum(item[2] for item in kept)
    return [text for _, text, _ in kept]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces short enough for the trainer, which drops longer ones, cut after white space where there is some."""
    for text in texts:
        start, step = 0, _MAX_SENTENCE_BYTES // 4  # a character takes at most four bytes
        while start < len(text):
            end = min(start + step, len(text))
            if end < len(text):
                cut = max(text.rfind(" ", start + step // 2, end), text.rfind("\n", start + step // 2, end))
                end = cut if cut > start else end
            yield text[start:end]
            start = end


def _training_error(error: Exception, settings: config.Tokenizer, size: int) -> DataError:
    message = str(error)
    limit = re.search(r"value <= (\d+)", message)
    if "Vocabulary size too high" in message and limit:
        return DataError(
            f"tokenizer.vocab_size {settings.vocab_size} cannot be reached with {size:,} bytes of text: at most {limit.group(1)} works; "
            f"set tokenizer.vocab_size={limit.group(1)} or give more text in tokenizer.datasets"
        )
    if re.search(r"Vocabulary size.*too (small|low)|smaller than required_chars", message):
        return DataError(f"tokenizer.vocab_size {settings.vocab_size} does not hold the characters of the text; raise it or lower "
                         f"tokenizer.character_coverage (now {settings.character_coverage})")
    if "sentences_.empty" in message:
        return DataError("the texts for the tokenizer are all empty; name datasets with text in tokenizer.datasets")
    return DataError(f"the tokenizer could not be trained: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
