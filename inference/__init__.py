"""From a run directory to text, figures, other formats and the Hub."""
