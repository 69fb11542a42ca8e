"""Kinds of records: what one row says, and all that differs by it; `content` lists what a kind answers."""
