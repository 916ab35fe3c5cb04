"""What a run shows and gives away: report, model card, and the way to the Hub."""
