"""Which coordinates are kept: across how many heads, in which basis, and the best of them."""
