"""Offline: sensitivity -> allocation -> importance -> plan -> surgery."""
