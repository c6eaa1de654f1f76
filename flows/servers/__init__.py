"""MLflow's and Prefect's servers: started, watched, checked; work pools, deployments and automations on them."""
