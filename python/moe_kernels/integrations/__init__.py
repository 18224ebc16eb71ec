"""Hooks into the libraries people already use. Nothing is imported, and nothing registered, until a submodule is."""
