"""Adapters inside other libraries' training loops."""
