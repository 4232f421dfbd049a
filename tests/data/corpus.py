"""A small multilingual text corpus and a tokenizer trained on it, for the tests of this room."""

import functools
import random
import tempfile

from conan_jax import config
from conan_jax.data.tokenizer import Tokenizer, train_tokenizer

WORDS = (
    "the a of and to in is it that for read write open close file path name value key list dict set number text line word query answer "
    "document passage score train model batch step loss weight vector matrix shape length head layer token byte piece language search "
    "der die und ist nicht ein mit le la les est une dans pour что это как для на に は を が です ます 模型 训练 数据 文本 检索 句子 é ü ñ ß"
).split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different lines of random words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30))) + rng.choice([".", "?", "!\n", "  -- end"]) for i in range(count)]


@functools.cache
def tokenizer() -> Tokenizer:
    """One tokenizer of 600 tokens for all tests."""
    with tempfile.TemporaryDirectory() as folder:  # the tokenizer holds its model
        return train_tokenizer(sentences(2000), config.Tokenizer(vocab_size=600), folder)
