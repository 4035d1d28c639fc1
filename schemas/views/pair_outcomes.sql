-- Sampled unexposed pairs of a run date, each with its outcome: labeled, or the reason why not.
--   dt: Run date
--   user_id: The platform's user id
--   item_index: Number of the item
--   outcome: labeled, no_history, no_anchors, no_embedding or other
--   unexposed_rows: Rows of unexposed_samples
WITH wanted AS (
  SELECT dt, user_id, item_index, count(*) AS unexposed_rows
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
-- A user's sequence is valid from its date until that of the next one.
histories AS (
  SELECT user_id, length, sid_version, dt AS first_dt, lead(dt) OVER (PARTITION BY user_id ORDER BY dt) AS next_dt
  FROM user_sequences
),
feeds AS (
  SELECT dt, max(sid_version) AS sid_version FROM training_feed GROUP BY dt
)
SELECT
  w.dt,
  w.user_id,
  w.item_index,
  CASE
    WHEN l.user_id IS NOT NULL THEN 'labeled'
    WHEN a.user_id IS NULL AND h.user_id IS NULL THEN 'no_history'
    WHEN a.user_id IS NULL OR ru.key IS NOT NULL THEN 'no_anchors'
    WHEN ri.key IS NOT NULL THEN 'no_embedding'
    ELSE 'other'
  END AS outcome,
  w.unexposed_rows
FROM wanted w
LEFT JOIN feeds f ON f.dt = w.dt
LEFT JOIN labeled l ON l.dt = w.dt AND l.user_id = w.user_id AND l.item_index = w.item_index
LEFT JOIN asked a ON a.dt = w.dt AND a.user_id = w.user_id
LEFT JOIN histories h
  ON h.user_id = w.user_id
  AND h.first_dt <= w.dt
  AND (h.next_dt IS NULL OR h.next_dt > w.dt)
  AND h.length > 0
  AND h.sid_version = f.sid_version
LEFT JOIN rejected ru ON ru.dt = w.dt AND ru.key = concat('user_id=', w.user_id)
LEFT JOIN rejected ri ON ri.dt = w.dt AND ri.key = concat('item_index=', CAST(w.item_index AS STRING))
