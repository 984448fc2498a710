"""SmolLM2-135M learns on GSM8K when to let a calculator write the next token."""
