"""The report of an inventory: an HTML page that opens offline, and a static picture."""
