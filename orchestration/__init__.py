"""Takes an experiment to a cluster and keeps the records: Ray, Optuna and MLflow live here."""
