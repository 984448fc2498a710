"""SmolLM2-135M learns on GSM8K when a calculator should write the next token."""
