"""A place to look at features: a static site, a server with live questions, a card for notebooks."""
