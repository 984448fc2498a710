"""A small language model trained on GSM8K that learns when to let a calculator write the next token."""
