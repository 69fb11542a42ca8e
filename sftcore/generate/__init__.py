"""Generation: prompts -> completions, and how likely given ones are, by whatever engine there is.

In: prompts as token ids (of a server: texts), how to decode. Out: a reply with its text a completion; log-
probabilities of continuations.
Invariant: every caller (probe, evaluation, rationales, `sftcore generate`) asks through `api.Generator`.
Trade-off: one signature for three engines hides what only one of them can do (early ends: ours alone).
"""
