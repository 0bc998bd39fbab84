"""Keeps a student's level equal in specialization_progress and user_licenses, inside PostgreSQL."""
