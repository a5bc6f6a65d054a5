"""Names of the files that a run leaves in its folder."""

REQUESTS, SETUP = "requests.jsonl", "setup.json"
METRICS_CSV, SUMMARY = "metrics.csv", "summary.json"
