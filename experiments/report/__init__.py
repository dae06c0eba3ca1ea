"""The report of runs: `runs` reads them, `rows` judges them, `charts` and `page` show them."""
