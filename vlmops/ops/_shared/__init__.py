"""Written once, used by every op: registration and choice, checks, activations, weight packing, masks."""
