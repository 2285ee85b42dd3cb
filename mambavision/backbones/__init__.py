"""Feature extractors, one file per architecture."""
