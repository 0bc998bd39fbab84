"""Reads level_sync for people and monitoring systems. Needs nothing that changes a database."""
