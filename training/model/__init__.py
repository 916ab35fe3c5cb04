"""What is done with a model besides training it: loading, sampling, optimizers and devices."""
