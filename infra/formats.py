from infra.rows import canonical, has_input
