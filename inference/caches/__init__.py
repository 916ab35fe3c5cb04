"""What a model keeps of earlier tokens while it generates: one small file a policy, one table (`policies.py`)."""
