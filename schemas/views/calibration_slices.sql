-- Calibration error of the labels of exposed pairs per slice: source, category, item popularity, new users and items.
--   dt: Run date
--   source: uniform (unbiased) or exposed (biased by what was shown)
--   slice: all, category, popularity, item or user
--   value: Category; decile of positives (10 the most popular, unseen without any); new or known; all
--   impressions: Scored impressions
--   clicks: Clicked ones
--   mean_label: Mean pseudo-label
--   click_rate: Share that was clicked
--   calibration_error: Expected calibration error over label bands (two per doubling): sum of |labels - clicks| / impressions
WITH deciles AS (
  SELECT dt, item_index, ntile(10) OVER (PARTITION BY dt ORDER BY positives, item_index) AS decile
  FROM item_stats
  WHERE positives > 0
),
shown AS (
  SELECT
    l.dt,
    l.source,
    floor(2 * log2(greatest(l.pseudo_label, 0.000001))) AS band,
    l.pseudo_label,
    CAST(i.clicked AS DOUBLE) AS clicked,
    t.category,
    coalesce(CAST(d.decile AS STRING), 'unseen') AS popularity,
    CASE WHEN coalesce(s.impressions, 0) = 0 THEN 'new' ELSE 'known' END AS item,
    CASE WHEN coalesce(u.impressions, 0) = 0 THEN 'new' ELSE 'known' END AS person
  FROM pseudo_labels l
  JOIN impressions i
    ON i.dt = l.dt
    AND i.user_id = l.user_id
    AND i.item_index = l.item_index
    AND CASE WHEN i.is_random THEN 'uniform' ELSE 'exposed' END = l.source
  JOIN items t ON t.item_index = l.item_index
  LEFT JOIN deciles d ON d.dt = l.dt AND d.item_index = l.item_index
  LEFT JOIN item_stats s ON s.dt = l.dt AND s.item_index = l.item_index
  LEFT JOIN user_stats u ON u.dt = l.dt AND u.user_id = l.user_id
),
banded AS (
  SELECT
    p.dt,
    p.source,
    s.slice,
    CASE s.slice
      WHEN 'all' THEN 'all'
      WHEN 'category' THEN p.category
      WHEN 'popularity' THEN p.popularity
      WHEN 'item' THEN p.item
      ELSE p.person
    END AS value,
    p.band,
    count(*) AS impressions,
    sum(p.clicked) AS clicks,
    sum(p.pseudo_label) AS labels
  FROM shown p
  CROSS JOIN (VALUES ('all'), ('category'), ('popularity'), ('item'), ('user')) AS s(slice)
  GROUP BY 1, 2, 3, 4, 5
)
SELECT
  dt,
  source,
  slice,
  value,
  CAST(sum(impressions) AS BIGINT) AS impressions,
  CAST(sum(clicks) AS BIGINT) AS clicks,
  sum(labels) / sum(impressions) AS mean_label,
  sum(clicks) / sum(impressions) AS click_rate,
  sum(abs(labels - clicks)) / sum(impressions) AS calibration_error
FROM banded
GROUP BY dt, source, slice, value
