"""Small histories written by hand: `good` ones that keep every promise, `bad` ones that break one.

Each is a function that tells a short story to a `world.World`, which writes down what a system that
works would have left behind. A bad story changes one thing of it afterwards.
"""
