"""Address of the repository, in links to it and in commands that install from it."""

# Nobody has published it yet. Who does puts the account everywhere: `hatch run release:address URL`.
REPOSITORY = "https://github.com/OWNER/jllm"
BRANCH = "main"
