"""`vlmops tune`: measure every choice a model will ask for, before it is asked for."""
