-- Expected share of the interest model's targets that popularity down-sampling removes, per popularity decile of the items.
--   dt: Run date
--   keep_target_share: The setting interest.keep_target_share that the row is for
--   popularity: Decile of positives in the window, 10 the most popular
--   item_count: Items with positives
--   positives: Their positives in the window
--   removed_share: Share of these that are not targets; they stay in the context
WITH shares AS (
  SELECT dt, item_index, positives, CAST(positives AS DOUBLE) / sum(positives) OVER (PARTITION BY dt) AS f
  FROM item_stats
  WHERE positives > 0
),
-- The kept share at scale s = sqrt(tau) is the sum of min(f, s * sqrt(f)): the least of the lines below_k + s * roots_k
-- over k, with the k rarest items kept whole. So s is the largest of their solutions.
lines AS (
  SELECT
    dt, item_index, positives, f,
    ntile(10) OVER (PARTITION BY dt ORDER BY positives, item_index) AS popularity,
    sum(f) OVER (PARTITION BY dt ORDER BY f, item_index ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) - f AS below,
    sum(sqrt(f)) OVER (
      PARTITION BY dt ORDER BY f DESC, item_index DESC ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
    ) AS roots
  FROM shares
),
scales AS (
  SELECT l.dt, s.keep_target_share, max((s.keep_target_share - l.below) / l.roots) AS scale
  FROM lines l
  CROSS JOIN (
    SELECT CAST(share AS DOUBLE) AS keep_target_share
    FROM (VALUES (0.5), (0.6), (0.7), (0.75), (0.8), (0.85), (0.9), (0.95)) AS v(share)
  ) s
  GROUP BY l.dt, s.keep_target_share
)
SELECT
  l.dt,
  s.keep_target_share,
  l.popularity,
  count(*) AS item_count,
  sum(l.positives) AS positives,
  sum(CASE WHEN sqrt(l.f) > s.scale THEN l.f * (1 - s.scale / sqrt(l.f)) ELSE 0 END) / sum(l.f) AS removed_share
FROM lines l
JOIN scales s ON s.dt = l.dt
GROUP BY l.dt, s.keep_target_share, l.popularity
