"""Every parallel strategy, one file each, and the one function that orders them."""
