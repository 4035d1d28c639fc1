-- Sampled unexposed rows of a run date: labeled, or the reason why not.
--   dt: Run date
--   outcome: labeled, no_history, no_anchors, no_embedding or other
--   unexposed_rows: Rows of unexposed_samples
WITH wanted AS (
  SELECT dt, user_id, item_index, count(*) AS sampled
  FROM unexposed_samples
  GROUP BY dt, user_id, item_index
),
labeled AS (
  SELECT dt, user_id, item_index FROM pseudo_labels WHERE source = 'unexposed'
),
asked AS (
  SELECT DISTINCT dt, user_id FROM score_requests WHERE source = 'unexposed'
),
rejected AS (
  SELECT DISTINCT dt, key FROM worker_rejects WHERE step = 'score_candidates'
),
latest AS (
  SELECT u.dt, u.user_id, max(s.dt) AS sequence_dt
  FROM (SELECT DISTINCT dt, user_id FROM unexposed_samples) u
  JOIN user_sequences s ON s.user_id = u.user_id AND s.dt <= u.dt
  GROUP BY u.dt, u.user_id
),
histories AS (
  SELECT l.dt, l.user_id
  FROM latest l
  JOIN user_sequences s ON s.user_id = l.user_id AND s.dt = l.sequence_dt AND s.length > 0
  JOIN (SELECT dt, max(sid_version) AS sid_version FROM training_feed GROUP BY dt) f
    ON f.dt = l.dt AND f.sid_version = s.sid_version
)
SELECT
  w.dt,
  CASE
    WHEN l.user_id IS NOT NULL THEN 'labeled'
    WHEN a.user_id IS NULL AND h.user_id IS NULL THEN 'no_history'
    WHEN a.user_id IS NULL OR ru.key IS NOT NULL THEN 'no_anchors'
    WHEN ri.key IS NOT NULL THEN 'no_embedding'
    ELSE 'other'
  END AS outcome,
  sum(w.sampled) AS unexposed_rows
FROM wanted w
LEFT JOIN labeled l ON l.dt = w.dt AND l.user_id = w.user_id AND l.item_index = w.item_index
LEFT JOIN asked a ON a.dt = w.dt AND a.user_id = w.user_id
LEFT JOIN histories h ON h.dt = w.dt AND h.user_id = w.user_id
LEFT JOIN rejected ru ON ru.dt = w.dt AND ru.key = concat('user_id=', w.user_id)
LEFT JOIN rejected ri ON ri.dt = w.dt AND ri.key = concat('item_index=', CAST(w.item_index AS STRING))
GROUP BY 1, 2
