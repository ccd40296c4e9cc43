"""A place to look: the site of a dictionary's features, the server behind it, and its card in a notebook."""
