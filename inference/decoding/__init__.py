"""How text is drawn from a model: prompts, strategies, drafts, the compiled step, and how it is written out."""
