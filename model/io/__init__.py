"""Between disk and network: checkpoints, adapters, tokenizer, images."""
