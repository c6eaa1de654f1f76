"""What configs, rows, requests and results look like. Needs neither torch nor Prefect nor MLflow."""
