"""From files to trained tokens: records -> filters -> prompts -> store (CPU only, no torch)."""
