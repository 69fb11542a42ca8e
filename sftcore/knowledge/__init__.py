"""What a model remembers: facts, completion templates, containment, memory levels, selection by level."""
