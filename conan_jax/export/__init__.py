"""What leaves this package: a folder that sentence-transformers loads, its card, and the proof that it computes the same."""
