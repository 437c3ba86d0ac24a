"""Address of the repository, in links to it and in commands that install from it."""

# Nobody has published it yet: who does puts the account here, and in `[project.urls]` of the packages.
REPOSITORY = "https://github.com/OWNER/jllm"
BRANCH = "main"
