"""Folders of the Hugging Face form: stock decoder architectures, safetensors, tokenizer.json."""
