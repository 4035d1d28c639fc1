-- Labels of exposed pairs against their clicks, in bands of the label (two bands per doubling). For evaluation only, never for fitting.
--   dt: Run date
--   source: uniform (unbiased) or exposed (biased by what was shown)
--   band_from: Lower end of the band
--   impressions: Scored impressions
--   clicks: Clicked ones
--   mean_label: Mean pseudo-label
--   click_rate: Share that was clicked
--   squared_error: Mean squared difference of label and click
WITH shown AS (
  SELECT
    l.dt,
    l.source,
    floor(2 * log2(greatest(l.pseudo_label, 0.000001))) AS band,
    l.pseudo_label,
    CAST(i.clicked AS DOUBLE) AS clicked
  FROM pseudo_labels l
  JOIN impressions i
    ON i.dt = l.dt
    AND i.user_id = l.user_id
    AND i.item_index = l.item_index
    AND CASE WHEN i.is_random THEN 'uniform' ELSE 'exposed' END = l.source
)
SELECT
  dt,
  source,
  power(2.0, CAST(band AS DOUBLE) / 2) AS band_from,
  count(*) AS impressions,
  CAST(sum(clicked) AS BIGINT) AS clicks,
  avg(pseudo_label) AS mean_label,
  avg(clicked) AS click_rate,
  avg((pseudo_label - clicked) * (pseudo_label - clicked)) AS squared_error
FROM shown
GROUP BY dt, source, band
