-- Grants for a catalog with SQL grants (Unity, Hive with authorization), after gpl register. Groups are examples.
-- Column-level masking of user_id, where the catalog has it, goes on top: no view that counts needs the id.

GRANT USE SCHEMA ON SCHEMA gpl TO `analysts`;
GRANT SELECT ON VIEW gpl.label_quality TO `analysts`;
GRANT SELECT ON VIEW gpl.label_distribution TO `analysts`;
GRANT SELECT ON VIEW gpl.label_slices TO `analysts`;
GRANT SELECT ON VIEW gpl.calibration_slices TO `analysts`;
GRANT SELECT ON VIEW gpl.down_sampling TO `analysts`;
GRANT SELECT ON VIEW gpl.coverage TO `analysts`;
GRANT SELECT ON VIEW gpl.confidence_factors TO `analysts`;
GRANT SELECT ON VIEW gpl.calibration TO `analysts`;
GRANT SELECT ON TABLE gpl.monitors TO `analysts`;
GRANT SELECT ON TABLE gpl.evaluations TO `analysts`;
GRANT SELECT ON TABLE gpl.control_evaluations TO `analysts`;
GRANT SELECT ON TABLE gpl.job_runs TO `analysts`;

-- These name single users.
GRANT SELECT ON VIEW gpl.user_anchors TO `label_debuggers`;
GRANT SELECT ON VIEW gpl.explained_pairs TO `label_debuggers`;
GRANT SELECT ON VIEW gpl.pair_outcomes TO `label_debuggers`;
GRANT SELECT ON TABLE gpl.preranker_scores TO `label_debuggers`;
GRANT SELECT ON TABLE gpl.pseudo_labels TO `label_debuggers`;

GRANT USE SCHEMA ON SCHEMA gpl TO `trainers`;
GRANT SELECT ON TABLE gpl.training_feed TO `trainers`;
