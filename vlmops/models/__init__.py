"""A complete, readable stack of vision-language models on vlmops' own ops."""
