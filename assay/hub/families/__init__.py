"""One file for each family of checkpoints; `assay.hub.family` finds them here."""
