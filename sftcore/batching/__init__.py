"""Which samples run together, on which rank, in which step: pure functions on integers until `collate`."""
