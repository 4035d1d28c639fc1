-- Labels and weights of the feed's unexposed rows by recall channel, item popularity, category, and new users and items.
--   dt: Run date
--   slice: channel, category, popularity, item or user
--   value: Channel; category; decile of positives (10 the most popular, unseen without any); new or known
--   feed_rows: Unexposed rows of the feed
--   mean_label: Mean pseudo-label
--   spread_label: Standard deviation of the pseudo-label; null for a single row
--   highest_label: Largest pseudo-label
--   mean_weight: Mean sample weight
--   spread_weight: Standard deviation of the sample weight; null for a single row
WITH deciles AS (
  SELECT dt, item_index, ntile(10) OVER (PARTITION BY dt ORDER BY positives, item_index) AS decile
  FROM item_stats
  WHERE positives > 0
),
labeled AS (
  SELECT
    f.dt,
    f.channel,
    i.category,
    coalesce(CAST(d.decile AS STRING), 'unseen') AS popularity,
    CASE WHEN coalesce(s.impressions, 0) = 0 THEN 'new' ELSE 'known' END AS item,
    CASE WHEN coalesce(u.impressions, 0) = 0 THEN 'new' ELSE 'known' END AS person,
    CAST(f.pseudo_label AS DOUBLE) AS pseudo_label,
    CAST(f.sample_weight AS DOUBLE) AS sample_weight
  FROM training_feed f
  JOIN items i ON i.item_index = f.item_index
  LEFT JOIN deciles d ON d.dt = f.dt AND d.item_index = f.item_index
  LEFT JOIN item_stats s ON s.dt = f.dt AND s.item_index = f.item_index
  LEFT JOIN user_stats u ON u.dt = f.dt AND u.user_id = f.user_id
  WHERE NOT f.is_exposed
)
SELECT
  l.dt,
  s.slice,
  CASE s.slice
    WHEN 'channel' THEN l.channel
    WHEN 'category' THEN l.category
    WHEN 'popularity' THEN l.popularity
    WHEN 'item' THEN l.item
    ELSE l.person
  END AS value,
  count(*) AS feed_rows,
  avg(l.pseudo_label) AS mean_label,
  stddev(l.pseudo_label) AS spread_label,
  max(l.pseudo_label) AS highest_label,
  avg(l.sample_weight) AS mean_weight,
  stddev(l.sample_weight) AS spread_weight
FROM labeled l
CROSS JOIN (VALUES ('channel'), ('category'), ('popularity'), ('item'), ('user')) AS s(slice)
GROUP BY 1, 2, 3
