-- Sampled unexposed rows of a run date: labeled, or the reason why not.
--   dt: Run date
--   outcome: labeled, no_history, no_anchors, no_embedding or other
--   unexposed_rows: Rows of unexposed_samples
SELECT dt, outcome, sum(unexposed_rows) AS unexposed_rows
FROM pair_outcomes
GROUP BY dt, outcome
