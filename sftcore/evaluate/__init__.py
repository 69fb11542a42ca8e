"""Evaluation: weights -> one prediction an item -> accuracies with their uncertainty.

In: a model and test items. Out: eval/*/predictions.jsonl (a row per item), scores.json (what they add up to).
Invariant: every score can be counted again from predictions.jsonl alone.
Trade-off: every prediction is kept as text (about 200 bytes an item, 2 MB for EntityQuestions' test split).
"""
