"""MLflow: runs, figures, registered students, lineage, and fetching models by any name."""
