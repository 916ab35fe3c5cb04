"""The way from a text to tokens, and from tokens to the rows that a model is trained on."""
