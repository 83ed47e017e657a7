"""What the tests share: the tolerance rule, ragged shapes, tiny models."""
