"""Sending requests: when, how, and the record of each."""
