"""What a token and a verification cost, as ratios against references measured in the same run."""
