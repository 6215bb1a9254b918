"""One module for each group of routes. A route translates, calls one thing, and translates back."""
