"""Names that scripts written for the reference import. Nothing of ours imports them."""
