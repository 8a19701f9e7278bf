"""Integer-only networks: the prepared graph trains, the program is proven, the network runs."""
