-- Histogram of the labels and of the weights of a run date, in 50 cells; the last weight cell includes everything above 4.
--   dt: Run date
--   source: unexposed, exposed or uniform
--   measure: pseudo_label or weight
--   cell_from: Lower end of the cell
--   pairs: Labeled pairs in the cell
WITH cells AS (
  SELECT
    p.dt,
    p.source,
    m.measure,
    CASE m.measure
      WHEN 'pseudo_label' THEN least(floor(p.pseudo_label * 50), 49) / 50
      ELSE least(floor(p.weight * 12.5), 49) / 12.5
    END AS cell_from
  FROM pseudo_labels p
  CROSS JOIN (VALUES ('pseudo_label'), ('weight')) AS m(measure)
)
SELECT dt, source, measure, cell_from, count(*) AS pairs
FROM cells
GROUP BY dt, source, measure, cell_from
