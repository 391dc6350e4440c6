"""The truth: every op in plain torch, forward and explicit backward, on any device and dtype."""
