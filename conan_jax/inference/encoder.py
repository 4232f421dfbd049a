"""`Encoder`: texts in, unit vectors out. What evaluation, search and `conan_jax.Encoder` use."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Num

from conan_jax import config
from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.errors import ConfigError, DataError
from conan_jax.hf.text_settings import TextSettings
from conan_jax.inference import buckets
from conan_jax.inference.forward import Forward
from conan_jax.inference.identity import weights_sha256
from conan_jax.inference.load import load, untrained
from conan_jax.inference.outputs import check_output, converter
from conan_jax.inference.precision import Precision, check_precision, is_whole, kept_dimensions, quantize
from conan_jax.inference.progress import rate, text_bars
from conan_jax.inference.prompts import DOCUMENT, QUERY
from conan_jax.inference.tokens import RowReader
from conan_jax.model import Bidirectional, Mask

DEFAULT_MAX_LENGTH = 512
DEFAULT_BATCH_SIZE = 256
TEXTS_PER_ROUND = 8192  # texts that are sorted by length together; bounds the memory of their tokens
# Batches computed and not yet collected. Each has a thread of its own: a CPU then computes two side by side, and what of one occupies a
# single core hides behind the products of the other.
IN_FLIGHT = 2

# Of a device: the tokens of one batch, and the operations of padding that one more shape to compile is worth. On a CPU small batches stay
# in its caches. Compiling takes as long as a few times these operations: texts are seldom encoded once only.
TOKENS_PER_BATCH = {"cpu": 4096, "gpu": 65_536, "tpu": 65_536}
OPERATIONS_PER_SHAPE = {"cpu": 2e10, "gpu": 1e14, "tpu": 1e14}


class Encoder:
    """A trained model with its tokenizer and the attention mask it was trained to use.

    Args:
        params: the Embedder's parameter tree. It may lie anywhere; the devices get a copy of their own at the first call.
        model: its configuration.
        tokenizer: the one it was trained with.
        mask: how tokens attend to each other; bidirectional unless the last stage trained says otherwise.
        identity: where the weights come from (run, stage, step).
        prompts: what stands before a text, by name: full strings. `encode_query` uses "query", `encode_document` "document".
        texts: how texts are read; of an imported model, as its folder says.
        devices: where to encode; default: all devices of this process.

    Attributes:
        texts_cut: number of texts cut at `max_length` by all calls so far.
    """

    def __init__(
        self, params: Any, model: config.Model, tokenizer: AnyTokenizer, mask: Mask = Bidirectional(),
        identity: Mapping[str, Any] | None = None, prompts: Mapping[str, str] | None = None,
        texts: TextSettings = TextSettings(), *, devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model knows {model.vocab_size}")
        self.params, self.model, self.tokenizer, self.mask, self.texts = params, model, tokenizer, mask, texts
        self.texts_cut = 0
        self._max_seq_length: int | None = None
        self._shapes: set[tuple[int, int]] = set()  # of batches met so far
        self._names = dict(identity or {})
        self.prompts: dict[str, str] = {QUERY: "", DOCUMENT: "", **(prompts or {})}
        self._forward = Forward(params, model, mask, devices)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, devices: Sequence[jax.Device] | None = None) -> Encoder:
        """Read an export, or the newest weights of a stage folder or of the last trained stage of a run folder.

        The tokenizer is looked for in the folder of the run first, so a run may be moved as a whole.
        Raises `CheckpointError` when there is no complete checkpoint or no tokenizer with the recorded sha256.
        """
        return cls(*load(folder), devices=devices)

    @classmethod
    def untrained(cls, run: config.Run, tokenizer: AnyTokenizer) -> Encoder:
        """The model of `run` before its first step, with its first stage's mask at step 0: what training is measured against."""
        return cls(*untrained(run, tokenizer))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Where the weights come from, and sha256 of the tokenizer and of the weights (`inference.identity`).

        Kept beside an index, so that a query is never encoded by another model than the documents were. The weights are read at the
        first call: a few seconds a gigabyte.
        """
        texts = {} if self.texts == TextSettings() else {"texts": asdict(self.texts)}
        return {"tokenizer_sha256": self.tokenizer.sha256, **self._names, **texts,
                "weights_sha256": weights_sha256(self.params, self.model)}

    @property
    def dimension(self) -> int:
        """Width D of the vectors."""
        return self.model.hidden_size

    def get_sentence_embedding_dimension(self) -> int:
        """`dimension`, under the name that sentence-transformers gives it."""
        return self.dimension

    @property
    def max_seq_length(self) -> int:
        """Number of tokens, prompt and EOS included, to which `encode` cuts a text without `max_length`. May be set; None: the default.

        Raises `ConfigError` when it is set to a length the model does not know.
        """
        return self.row_length()

    @max_seq_length.setter
    def max_seq_length(self, length: int | None) -> None:
        self._max_seq_length = None if length is None else self.row_length(length)

    def encode(
        self,
        inputs: str | Sequence[str] | np.ndarray,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        show_progress_bar: bool = False,
        precision: Precision = "float32",
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        max_length: int | None = None,
        ranges: Float[np.ndarray, "2 D"] | None = None,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        output_value: str = "sentence_embedding",
        device: object = None,
    ) -> Num[np.ndarray, "N D"]:
        """One vector a text, in the order of `inputs`; a single string gives [D], no text [0, D].

        Before the text the model reads `prompt`, or `prompts[prompt_name]`; its tokens are attended to and not pooled (METHODS 1.7),
        unless the folder of an imported model says that they are. An
        empty text is its EOS token alone, white space and control characters are text, and a lone surrogate, which is none, is
        read as U+FFFD. Of a text far beyond `max_length` only the beginning is looked at.

        Texts are sorted by length and encoded in few shapes (`inference.buckets`), on all devices at once. The vector of a text
        depends on what it is encoded with by rounding alone, 1e-6 in float32.

        Args:
            batch_size: the most texts a device encodes at once. Batches of long texts are smaller: 4,096 tokens on a CPU, 65,536
                elsewhere.
            precision: of the result (`inference.precision`).
            normalize_embeddings: bring truncated vectors back to length 1. Whole ones have it always, as in an export.
            truncate_dim: keep this many of the first dimensions (METHODS 1.6).
            max_length: tokens, prompt and EOS included, at which a text is cut. Default: 512, or less where the model knows less; of an
                imported model, what its folder says.
            ranges: lowest and highest value of each kept dimension, for precision int8 and uint8; default: of these vectors.
            convert_to_tensor: return a torch tensor in place of an array.
            convert_to_numpy: when False, and `convert_to_tensor` as well, return a list of torch tensors, one a text.
            output_value: "sentence_embedding" only.
            device: has no effect and warns once: JAX chooses the devices (`devices` of the Encoder, or JAX_PLATFORMS).

        Raises:
            ConfigError: an option outside of what the model can do, a prompt that is not known or leaves no room, or torch is needed
                and not installed.
            DataError: `inputs` are no strings, or a vector is not finite.
        """
        check_output(output_value, device)
        convert = converter(convert_to_numpy, convert_to_tensor)
        if isinstance(inputs, np.ndarray) and inputs.ndim == 0:
            inputs = inputs.item()
        if isinstance(inputs, str):
            vectors = self.encode([inputs], prompt_name, prompt, batch_size, show_progress_bar, precision, normalize_embeddings,
                                  truncate_dim, max_length, ranges)
            return convert(vectors)[0]
        if isinstance(inputs, (bytes, Mapping)) or not isinstance(inputs, Iterable):
            raise DataError(f"texts must be a string or a sequence of strings, got {type(inputs).__name__}")
        texts = list(inputs)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is {type(text).__name__}, not str: {text!r:.80}")
        check_precision(precision)
        kept = kept_dimensions(truncate_dim, self.dimension)
        longest = self.row_length(max_length)
        if not is_whole(batch_size) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number above 0, got {batch_size!r}")
        reader = RowReader(self.tokenizer, self.prompt(prompt_name, prompt), longest, self.texts)
        vectors = np.empty((len(texts), kept), np.float32)
        with _progress(len(texts), show_progress_bar) as advance:
            for start, rows in self._rounds(texts, reader):
                for members, part in self._vectors(rows, reader.prompt_length, batch_size, longest):
                    vectors[start + members] = part[:, :kept]
                    advance(len(members))
        if kept < self.dimension and normalize_embeddings:
            vectors = normalised(vectors)
        return convert(quantize(vectors, precision, ranges))

    def encode_query(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Num[np.ndarray, "N D"]:
        """`encode` of what is searched for, after `prompts["query"]` unless another prompt is given."""
        return self.encode(inputs, prompt_name or QUERY, prompt, **options)

    def encode_document(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Num[np.ndarray, "N D"]:
        """`encode` of what is searched in, after `prompts["document"]`, which is empty, unless another prompt is given."""
        return self.encode(inputs, prompt_name or DOCUMENT, prompt, **options)

    @staticmethod
    def similarity(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> Float32[np.ndarray, "N M"]:
        """The cosine of every pair; one vector [D] counts as [1, D]. Raises `DataError` for vectors of different widths."""
        a, b = _comparable(a, b)
        return normalised(a) @ normalised(b).T

    @staticmethod
    def similarity_pairwise(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, " N"]:
        """The cosine of a[i] and b[i]. Raises `DataError` when there are not as many of one as of the other."""
        a, b = _comparable(a, b)
        if a.shape != b.shape:
            raise DataError(f"pairs need as many vectors on both sides, got {a.shape} and {b.shape}")
        return np.sum(normalised(a) * normalised(b), axis=1)

    def prompt(self, name: str | None = None, prompt: str | None = None) -> str:
        """The string that stands before a text: `prompt` where it is given, else the one called `name`, else the model's default."""
        if not isinstance(prompt, str | None) or not isinstance(name, str | None):
            raise ConfigError(f"prompt and prompt_name must be strings, got {prompt if prompt is not None else name!r:.80}")
        name = name if name is not None or prompt is not None else self.texts.default_prompt_name
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            raise ConfigError(f"there is no prompt {name!r}; this model has {', '.join(map(repr, self.prompts))}, or give prompt=")
        return self.prompts[name]

    def row_length(self, max_length: int | None = None) -> int:
        """The tokens a text is cut to. Raises `ConfigError` for a `max_length` the model does not know."""
        longest = (self._max_seq_length or default_max_length(self.model, self.texts)) if max_length is None else max_length
        if not is_whole(longest) or not 2 <= longest <= self.model.max_length:
            raise ConfigError(f"max_length must be a whole number in [2, {self.model.max_length}], what the model knows; got {longest!r}")
        return longest

    def _rounds(self, texts: list[str], reader: RowReader) -> Iterator[tuple[int, list[list[int]]]]:
        """(number of its first text, token rows) of each round; the next one is tokenised while the devices work on this one."""
        def tokenise(start: int) -> tuple[int, list[list[int]]]:
            rows, cut = reader.rows(texts[start : start + TEXTS_PER_ROUND])
            self.texts_cut += cut
            return start, rows

        starts = range(0, len(texts), TEXTS_PER_ROUND)
        if len(starts) < 2:
            yield from map(tokenise, starts)
            return
        with ThreadPoolExecutor(1, "tokenise") as pool:
            ahead = deque(pool.submit(tokenise, start) for start in starts[:2])
            for start in itertools.chain(starts[2:], (None, None)):
                done = ahead.popleft().result()
                if start is not None:
                    ahead.append(pool.submit(tokenise, start))
                yield done

    def _vectors(self, rows: list[list[int]], prompt_length: int, batch_size: int, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of the rows, their unit vectors), batch by batch, the longest rows first."""
        devices = self._forward.devices
        kind = devices[0].platform if devices[0].platform in TOKENS_PER_BATCH else "gpu"
        planned = buckets.batches(
            np.array([len(row) for row in rows], np.int64), longest=longest, most_rows=batch_size * len(devices),
            most_tokens=TOKENS_PER_BATCH[kind] * len(devices), multiple=len(devices),
            shape_tokens=OPERATIONS_PER_SHAPE[kind] * len(devices) / self._forward.operations_per_token)

        def compute(batch: buckets.Batch) -> tuple[np.ndarray, Array]:
            shaped = padded([rows[i] for i in batch.members], batch.rows, batch.length, prompt_length)
            vectors = self._forward(*shaped)
            return batch.members, vectors if len(devices) > 1 else vectors.block_until_ready()

        # Programs that span devices are launched by one thread, so that every device meets them in one order.
        with ThreadPoolExecutor(IN_FLIGHT if len(devices) == 1 else 1, "encode") as pool:
            pending: deque[Future] = deque()
            for batch in planned:
                pending.append(pool.submit(compute, batch))
                if (batch.rows, batch.length) not in self._shapes:
                    pending[-1].result()  # two threads would compile the same programs
                    self._shapes.add((batch.rows, batch.length))
                if len(pending) >= IN_FLIGHT:
                    yield _collected(*pending.popleft().result())
            while pending:
                yield _collected(*pending.popleft().result())


def default_max_length(model: config.Model, texts: TextSettings = TextSettings()) -> int:
    """Tokens a text is cut to unless the user says otherwise."""
    return min(texts.max_seq_length or DEFAULT_MAX_LENGTH, model.max_length)


def padded(rows: Sequence[Sequence[int]], count: int, length: int, prompt_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens Int32[count length], lengths, prompt lengths); rows beyond those given are empty."""
    tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths, np.where(lengths > 0, prompt_length, 0).astype(np.int32)


def normalised(vectors: Num[np.ndarray, "N D"]) -> Float32[np.ndarray, "N D"]:
    """x / ||x||, float32; a zero vector stays zero."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _collected(members: np.ndarray, vectors: Array) -> tuple[np.ndarray, np.ndarray]:
    return members, np.asarray(vectors)[: len(members)]


def _comparable(a: Any, b: Any) -> tuple[Num[np.ndarray, "N D"], Num[np.ndarray, "M D"]]:
    """Both as matrices of one width."""
    matrices = []
    for given in (a, b):
        try:
            matrix = np.asarray(given, np.float32)
        except (TypeError, ValueError):
            matrix = np.zeros(())
        if matrix.ndim not in (1, 2):
            raise DataError(f"vectors must be an array of numbers, [D] or [N, D], got {type(given).__name__}{list(np.shape(given))}")
        matrices.append(np.atleast_2d(matrix))
    a, b = matrices
    if a.shape[1] != b.shape[1]:
        raise DataError(f"vectors to compare must have one width, got {a.shape[1]} and {b.shape[1]} numbers; encode both with the same "
                        "truncate_dim")
    return a, b


class _progress:
    """A bar with rate and time left, or nothing: `with _progress(total, shown) as advance`."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = text_bars(disable=not shown)
        self._task = self._bar.add_task("encoding", total=total, rate="")

    def __enter__(self) -> Any:
        self._bar.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _advance(self, count: int) -> None:
        self._bar.update(self._task, advance=count, rate=rate(self._bar.tasks[0].speed))
