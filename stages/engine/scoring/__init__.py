"""Numbers about answers: judges, the reference's cached log-probs, and the metrics of an evaluation."""
