"""Small pieces that other people's frameworks name by their path."""
