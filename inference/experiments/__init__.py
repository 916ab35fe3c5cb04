"""What context and memory are worth: one file an experiment of `acorn lab`, each with its flags and its run."""
