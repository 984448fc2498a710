"""Mathematics and words: pure functions over tensors, no input or output."""
