"""A sentence-transformers folder: token rows are those of its own tokenizer, and what cannot be taken over is refused by name."""

import pytest
import tokenizers

from conan_jax.errors import ConanError
from conan_jax.export.verify import verify
from conan_jax.hf.importer import import_folder
from conan_jax.inference.encoder import Encoder
from conan_jax.inference.tokens import RowReader
from tests.hf import folders

TEXTS = ["the reader", "", "a file </s> sits", "the cat reads " * 30]


@pytest.mark.parametrize("single", ["$A </s>", "<pad> $A </s>", "<pad> $A", "$A <pad>"])
def test_rows_are_those_of_the_tokenizer_with_the_prompt_joined(tmp_path, single):
    folder, _ = folders.write(tmp_path / "a", causal=False)
    (folder / "tokenizer.json").write_text(folders.framed(single))
    folders.sentence_files(folder, {"include_prompt": True}, transformer={"max_seq_length": 20}, config={"prompts": {"query": "the re"}})
    import_folder(folder, tmp_path / "run")
    encoder = Encoder.load(tmp_path / "run")
    reference = tokenizers.Tokenizer.from_str(folders.framed(single))
    reference.enable_truncation(20)
    assert encoder.row_length() == 20 and encoder.prompts["query"] == "the re"
    for prompt in ("", "the re"):
        reader = RowReader(encoder.tokenizer, prompt, 20, encoder.texts)
        assert reader.rows(TEXTS)[0] == [reference.encode(prompt + text).ids for text in TEXTS] and reader.prompt_length == 0
    assert verify(tmp_path / "run", jax_only=True).ok


@pytest.mark.parametrize("files, named", [
    ({"modules": ("Transformer", "Pooling", "Dense", "Normalize")}, "Dense"), ({"modules": ("Router",)}, "Router"),
    ({"pooling": {"pooling_mode": "cls"}}, "cls"), ({"pooling": {"pooling_mode": ["mean", "max"]}}, "max"),
    ({"config": {"truncate_dim": 8}}, "truncate_dim"), ({"config": {"similarity_fn_name": "manhattan"}}, "similarity_fn_name"),
    ({"config": {"default_prompt_name": "x"}}, "default_prompt_name"), ({"transformer": {"query_length": 8}}, "query_length"),
])
def test_what_cannot_be_taken_over_is_refused_by_name(tmp_path, files, named):
    folder = folders.sentence_files(folders.write(tmp_path / "a", causal=False)[0], **files)
    with pytest.raises(ConanError, match=named):
        import_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
