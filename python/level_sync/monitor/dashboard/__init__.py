"""A page for people on call: is everything in step, and what must I do? Needs the extra `dashboard`.

Rendered on the server, from templates that escape every text; it reads and never writes.
"""
