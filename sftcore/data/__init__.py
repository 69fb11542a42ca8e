"""From files to trained tokens: records -> hygiene -> prompts -> store (CPU only, no torch)."""
