"""`vlmops demo`: a VLM answers about a picture, stock and patched, timed stage by stage."""
