-- The three confidence factors of a run date, and their correlations with each other and with similarity.
--   dt: Run date
--   source: unexposed, exposed or uniform
--   pairs: Labeled pairs
--   coherence: Mean of R_u
--   consistency: Mean of h_u
--   llm_confidence: Mean of q_ui
--   spread_coherence: Standard deviation of R_u
--   spread_consistency: Standard deviation of h_u
--   spread_llm_confidence: Standard deviation of q_ui
--   coherence_with_consistency: Correlation of R_u and h_u
--   coherence_with_similarity: Correlation of R_u and the similarity
--   llm_confidence_with_similarity: Correlation of q_ui and the similarity
SELECT
  dt,
  source,
  count(*) AS pairs,
  avg(coherence) AS coherence,
  avg(consistency) AS consistency,
  avg(llm_confidence) AS llm_confidence,
  stddev(coherence) AS spread_coherence,
  stddev(consistency) AS spread_consistency,
  stddev(llm_confidence) AS spread_llm_confidence,
  corr(coherence, consistency) AS coherence_with_consistency,
  corr(coherence, similarity) AS coherence_with_similarity,
  corr(llm_confidence, similarity) AS llm_confidence_with_similarity
FROM pseudo_labels
GROUP BY dt, source
