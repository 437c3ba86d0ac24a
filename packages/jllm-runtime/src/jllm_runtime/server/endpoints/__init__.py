"""HTTP endpoints, a file for each group of paths; ``app.py`` lists their routers."""
