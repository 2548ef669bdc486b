"""What is collected while batches run through a block: statistics of every input, and how much each row counts."""
