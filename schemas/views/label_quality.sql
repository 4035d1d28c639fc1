-- Pseudo-labels of a run date: number of pairs, and the distribution of labels and weights.
--   dt: Run date
--   source: unexposed, exposed or uniform
--   pairs: Labeled pairs
--   users: Distinct users among them
--   items: Distinct items among them
--   mean_label: Mean pseudo-label
--   spread_label: Standard deviation of the pseudo-label
--   lowest_label: Smallest pseudo-label
--   highest_label: Largest pseudo-label
--   mean_weight: Mean scaled weight
--   mean_raw_weight: Mean raw weight
--   calibrator_version: Calibrator that made the labels
--   model_version: Interest model behind the anchors
SELECT
  dt,
  source,
  count(*) AS pairs,
  count(DISTINCT user_id) AS users,
  count(DISTINCT item_index) AS items,
  avg(pseudo_label) AS mean_label,
  stddev(pseudo_label) AS spread_label,
  min(pseudo_label) AS lowest_label,
  max(pseudo_label) AS highest_label,
  avg(weight) AS mean_weight,
  avg(raw_weight) AS mean_raw_weight,
  max(calibrator_version) AS calibrator_version,
  max(model_version) AS model_version
FROM pseudo_labels
GROUP BY dt, source
