"""What each paper reports, measured again: a module for each, its tables and figures as functions."""
