-- Every labeled pair with the parts of its label: the user's rate and rank, matched anchor, factors. `gpl explain` adds the history items.
--   dt: Run date
--   user_id: The platform's user id
--   item_id: The platform's item id
--   title: Title of the item
--   source: unexposed, exposed or uniform
--   pseudo_label: Calibrated click probability
--   user_rate: The user's click rate before dt, shrunken: the level of quantile labels
--   user_rank: Rank of the pair among the user's other unexposed pairs, 1 the best
--   weight: Scaled weight
--   similarity: Cosine to the matched anchor
--   history_similarity: Largest cosine to an item of the history
--   anchor_rank: Rank of the matched anchor, 0 the most likely
--   anchor: Its semantic ID
--   anchor_title: Title of one item that carries it
--   anchor_items: Items that carry it
--   coherence: R_u
--   consistency: h_u
--   llm_confidence: q_ui
WITH matched AS (
  SELECT dt, user_id, anchor_rank, anchor, min(title) AS anchor_title, count(item_id) AS anchor_items
  FROM user_anchors
  GROUP BY dt, user_id, anchor_rank, anchor
)
SELECT
  p.dt,
  p.user_id,
  p.item_id,
  i.title,
  p.source,
  p.pseudo_label,
  p.user_rate,
  p.user_rank,
  p.weight,
  p.similarity,
  p.history_similarity,
  p.anchor_rank,
  m.anchor,
  m.anchor_title,
  m.anchor_items,
  p.coherence,
  p.consistency,
  p.llm_confidence
FROM pseudo_labels p
JOIN items i ON i.item_index = p.item_index
LEFT JOIN matched m ON m.dt = p.dt AND m.user_id = p.user_id AND m.anchor_rank = p.anchor_rank
