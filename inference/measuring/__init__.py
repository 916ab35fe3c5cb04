"""Figures and pictures of a model: loss by position, tasks of the field's harness, what attention looks at."""
