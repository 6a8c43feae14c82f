"""The study: every run, table and picture of the results."""
