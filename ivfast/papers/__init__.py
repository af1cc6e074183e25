"""The papers' tables and figures, each from a run of one function: a file per paper."""
