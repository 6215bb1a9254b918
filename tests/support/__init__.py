"""Builders and fakes that tests share, typed like the product."""
