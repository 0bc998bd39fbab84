"""The demo, and the private PostgreSQL servers that it and the tests run on."""
