"""Who owns a run folder, what it holds, and when it is finished."""
