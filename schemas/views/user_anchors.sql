-- Interest anchors (the 100 most likely) that a user's pairs of a run date were scored with, and the items that carry their SIDs today.
--   dt: Run date
--   user_id: The platform's user id
--   anchor_rank: 0 for the most likely anchor
--   anchor: The anchor's semantic ID, codes joined by commas
--   probability: Probability of the anchor under the interest model
--   item_id: An item with that SID; null when none carries it any more
--   title: Its title
--   model_version: Interest model that generated the anchor
--   sid_version: Tokenizer behind the SIDs
WITH requests AS (
  SELECT
    dt,
    user_id,
    array_join(anchor_sids, ',') AS codes,
    array_join(log_prob, ',') AS logs,
    CAST(cardinality(log_prob) AS INT) AS anchors,
    CAST(CAST(cardinality(anchor_sids) AS INT) / CAST(cardinality(log_prob) AS INT) AS INT) AS levels,
    model_version,
    sid_version,
    row_number() OVER (PARTITION BY dt, user_id ORDER BY source) AS place
  FROM score_requests
  WHERE block = 0
),
ranked AS (
  SELECT r.dt, r.user_id, r.codes, r.logs, r.anchors, r.levels, r.model_version, r.sid_version, t.tens * 10 + o.ones AS k
  FROM requests r
  CROSS JOIN (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9)) AS t(tens)
  CROSS JOIN (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9)) AS o(ones)
  WHERE r.place = 1
),
anchors AS (
  SELECT
    dt,
    user_id,
    CAST(k AS INT) AS anchor_rank,
    substring_index(substring_index(codes, ',', CAST((k + 1) * levels AS INT)), ',', CAST(-levels AS INT)) AS anchor,
    CAST(substring_index(substring_index(logs, ',', CAST(k + 1 AS INT)), ',', -1) AS DOUBLE) AS log_prob,
    model_version,
    sid_version
  FROM ranked
  WHERE k < anchors
),
live AS (
  SELECT item_index, sid_version, array_join(sid, ',') AS anchor
  FROM item_sids
  WHERE retired_at = 0
)
SELECT
  a.dt,
  a.user_id,
  a.anchor_rank,
  a.anchor,
  exp(a.log_prob) AS probability,
  i.item_id,
  i.title,
  a.model_version,
  a.sid_version
FROM anchors a
LEFT JOIN live l ON l.sid_version = a.sid_version AND l.anchor = a.anchor
LEFT JOIN items i ON i.item_index = l.item_index
WHERE a.log_prob > -100
