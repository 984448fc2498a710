"""A small language model trained on GSM8K that learns when a calculator should write the next token."""
