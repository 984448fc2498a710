"""From rows of text to a trained pair: data, scoring by the frozen models, warm start of the head, training."""
