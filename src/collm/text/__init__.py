"""Text and tokens: chats, templates, tokenizers and their alignment, tool calls, grammars."""
