"""Tables for the terminal, plots, and the page."""
