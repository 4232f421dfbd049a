"""Texts in, vectors out: the encoder, whole corpora of vectors, and search over them."""
