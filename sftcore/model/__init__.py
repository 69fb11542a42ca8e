"""The model: loading, attention in packs, the head that only trained tokens pay for, decoding, cost.."""
