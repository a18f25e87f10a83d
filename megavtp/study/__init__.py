"""A scaling study: cells that are chains of the other commands, their costs, their results, and curves through them."""
