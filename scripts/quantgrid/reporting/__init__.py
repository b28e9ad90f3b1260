"""Reporting: from records to tables, figures, claims and the report page. No module here imports
torch."""
