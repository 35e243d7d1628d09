"""What drafting costs and yields, and the draft lengths that follow."""
