"""How runs and tables stand: handles, progress, bars, reports."""
