"""A static page that runs a bundle in a browser: `site` writes it, ``page/`` is what it is made of."""
