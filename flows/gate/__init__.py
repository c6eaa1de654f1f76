"""From a retraining's verdict to the champion: the error budget, a smoke test, a person's word, the version's page."""
