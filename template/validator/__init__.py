"""What only validators do: collect receipts, replay, lead, publish, score, set weights."""
