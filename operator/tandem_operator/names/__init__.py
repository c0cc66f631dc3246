"""Names that operator, workers, routers, chart and users share: tables, one per noun."""
