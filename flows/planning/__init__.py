"""From a config to a plan and to requests: nothing here starts a stage.

config_file reads and overrides, explain words the mistakes, config_checks looks at what the config refers to,
plan_checks at what its parts ask of each other; plan makes the nodes, requests their requests; dry_run and memory
estimate; sweep writes a config with all its variants.
"""
